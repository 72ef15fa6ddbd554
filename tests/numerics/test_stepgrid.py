"""The grid with its own scales: the closed-form gradient equals autograd's, and what is stored is what was trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from makeweight.numerics.grid import from_codes, grouped, qparams, ranges, to_codes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.stepgrid import moved_codes, moving_grid, stepped_grid, stored
from tests.numerics.test_grid import Round, leaves


class Cast(torch.autograd.Function):
    """Rounding to a dtype and back whose gradient is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """The formula of the papers, left to autograd."""
    view = weight.unflatten(1, (scale.shape[1], -1))
    held: Any = Cast.apply(scale.unsqueeze(-1), scale_dtype)
    code: Any = Round.apply(zero.unsqueeze(-1))
    rounded: Any = Round.apply(view / held + code)
    return ((rounded.clamp(scheme.qmin, scheme.qmax) - code) * held).flatten(1)


def a_case(scheme: Scheme, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, of which some lie far outside, scales and zero-points, in float64."""
    generator = torch.Generator().manual_seed(scheme.bits + group)
    weight = torch.randn(6, 48, generator=generator, dtype=torch.float64)
    scale, zero = qparams(*ranges(grouped(weight, group)), scheme, torch.float64)
    scale = scale * (0.4 + 0.8 * torch.rand(scale.shape, generator=generator, dtype=torch.float64))
    if not scheme.symmetric:
        zero = (zero + torch.randn(zero.shape, generator=generator)).clamp(scheme.qmin, scheme.qmax)
    return weight, scale, zero


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [8, 48])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradient_is_straight_through(bits: int, symmetric: bool, group: int, scale_dtype: torch.dtype) -> None:
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    case = a_case(scheme, group)
    ours, theirs = leaves(*case), leaves(*case)
    closed = stepped_grid(*ours, scheme, scale_dtype=scale_dtype, dtype=torch.float64)  # pyright: ignore[reportCallIssue]
    written_out = straight_through(*theirs, scheme, scale_dtype)  # pyright: ignore[reportCallIssue]
    assert torch.equal(closed, written_out)
    pull = torch.randn(closed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, want = torch.autograd.grad(closed, ours, pull), torch.autograd.grad(written_out, theirs, pull)
    for name, a, b in zip(("weight", "scale", "zero-point"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert b.any(), name


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_a_zero_point_learns_from_clipped_weights_alone(symmetric: bool) -> None:
    """Where nothing is clipped its gradient is nothing, not the noise of sums, which AdamW would follow."""
    scheme = Scheme(bits=3, group_size=48, symmetric=symmetric)
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    scale, zero = qparams(*ranges(grouped(weight, 48)), scheme, torch.float32)
    wide, moved = leaves(scale * 2, zero / 2)
    out = stepped_grid(weight, wide.float(), moved.float(), scheme, scale_dtype=torch.float32, dtype=torch.float32)
    out.square().sum().backward()
    assert wide.grad is not None and moved.grad is not None
    assert wide.grad.all() and not moved.grad.any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_what_ranges_give_is_stored_as_it_is(symmetric: bool, scale_dtype: torch.dtype) -> None:
    scheme = Scheme(bits=4, group_size=8, symmetric=symmetric)
    normal = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 1e6, 1e-6, 1e-9, 0.0):
        given = qparams(*ranges(grouped(normal * size, 8)), scheme, scale_dtype)
        assert all(torch.equal(a, b) for a, b in zip(given, stored(*given, scheme, scale_dtype), strict=True)), size


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_stored_is_a_scale_above_zero_and_a_code(scale_dtype: torch.dtype) -> None:
    scheme = Scheme(bits=2, group_size=8)
    wild = torch.tensor([[-1.0, 0.0, 1e-30, 1e-9, 0.1, 1e9]])
    scale, zero = stored(wild, wild * 1e9, scheme, scale_dtype)
    assert (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(scale, scale.to(scale_dtype).float())
    assert torch.equal(zero, zero.clamp(-2, 1).round())


def test_inputs_are_left_alone_and_gradients_keep_fp32_under_bf16() -> None:
    scheme = Scheme(bits=3, group_size=16)
    generator = torch.Generator().manual_seed(0)
    weight, pull = (torch.randn(4, 32, generator=generator) for _ in range(2))
    pull = pull.bfloat16().float()
    scale, zero = qparams(*ranges(grouped(weight, 16)), scheme, torch.float32)
    given = [t.clone().requires_grad_() for t in (weight, scale * 0.7, zero + 0.3)]
    copies = [t.detach().clone() for t in (*given, pull)]
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        out = stepped_grid(*given, scheme, scale_dtype=torch.bfloat16, dtype=dtype)  # pyright: ignore[reportCallIssue]
        assert out.dtype == dtype
        grads.append(torch.autograd.grad(out, given, pull.to(dtype)))
    for low_precision, full in zip(*grads, strict=True):
        assert low_precision.dtype == torch.float32 and torch.equal(low_precision, full)
    assert all(torch.equal(t.detach(), copy) for t, copy in zip((*given, pull), copies, strict=True))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_move_straight_through(bits: int, symmetric: bool) -> None:
    scheme, group = Scheme(bits=bits, group_size=8, symmetric=symmetric), 8
    weight, scale, zero = a_case(scheme, group)
    scale, zero = stored(scale, zero, scheme, torch.float64)
    codes = to_codes(grouped(weight, group), scale, zero, scheme).flatten(1).to(torch.int8)
    still = moving_grid(codes, torch.zeros_like(weight), scale, zero, scheme, torch.float64)
    assert torch.equal(still, from_codes(grouped(codes.double(), group), scale, zero).flatten(1))
    offset = torch.rand(codes.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    offset = offset.clamp(scheme.qmin - codes.double(), scheme.qmax - codes.double())
    ours, theirs = leaves(offset, scale), leaves(offset, scale)
    moved = moving_grid(codes, ours[0], ours[1], zero, scheme, torch.float64)
    rounded: Any = Round.apply(codes + theirs[0])
    written_out = from_codes(grouped(rounded, group), theirs[1], zero).flatten(1)
    assert torch.equal(moved, written_out)
    assert torch.equal(moved_codes(codes, offset, scheme), rounded.to(torch.int8))
    assert not torch.equal(moved, still)
    pull = torch.randn(moved.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for result in (moved, written_out):
        result.backward(pull)
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None and other.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12)
