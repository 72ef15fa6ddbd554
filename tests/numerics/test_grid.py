"""The grid equals compressed-tensors' own, and its closed-form gradient equals autograd's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from makeweight.numerics.grid import clipped_grid, from_codes, grouped, qparams, ranges, round_tokens, to_codes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.stepgrid import stored

SHAPES = ((5, 96), (1, 48), (16, 16))
GROUPS = (-1, 16, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def half_steps(rows: int, width: int, scheme: Scheme) -> Tensor:
    """Weights halfway between grid points, for a scale of exactly 1/8 in every group that holds both ends."""
    ends = [-scheme.qmax - 0.5, scheme.qmax + 0.5] if scheme.symmetric else [scheme.qmin, scheme.qmax]
    between = torch.arange(scheme.qmin, scheme.qmax) + 0.5
    values = torch.cat([torch.tensor(ends), between[torch.arange(6) * 37 % len(between)]]) / 8
    return values.repeat(rows, width // 8)


def weights(rows: int, width: int, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """Yield matrices that are hard in one way each."""
    normal = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width))
    yield "normal", normal * 0.02
    yield "all positive", normal.abs() + 0.1
    yield "all negative", -normal.abs() - 0.1
    yield "zeros", torch.zeros(rows, width)
    yield "a group of zeros", torch.cat([torch.zeros(rows, 8), normal[:, 8:]], 1)
    yield "one outlier", torch.cat([normal[:, :1] * 1e3, normal[:, 1:]], 1)
    yield "constant", torch.full((rows, width), -0.3)
    yield "too small for fp16 scales", normal * 1e-9
    yield "halfway", half_steps(rows, width, scheme)


def reference(weight: Tensor, scheme: Scheme, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Scale, zero-point, codes and fake-quantized weights as compressed-tensors computes them."""
    per_channel = scheme.group_size == -1
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy=QuantizationStrategy.CHANNEL if per_channel else QuantizationStrategy.GROUP,
        group_size=None if per_channel else group,
        scale_dtype=scale_dtype,
        zp_dtype=torch.int8,
    )
    view = weight.unflatten(1, (-1, group))
    scale, zero = calculate_qparams(view.amin(-1), view.amax(-1), args)
    codes = quantize(weight, scale, zero, args, dtype=torch.int8)
    return scale, zero, codes, fake_quantize(weight, scale, zero, args)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_compressed_tensors(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    for group_size in GROUPS:
        scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
        for rows, width in SHAPES:
            group = scheme.group_of(width, "w")
            for what, weight in weights(rows, width, scheme):
                if scale_dtype == torch.bfloat16 and what == "too small for fp16 scales":
                    continue  # ours are float16 numbers as well
                scale, zero = qparams(*ranges(grouped(weight, group)), scheme, scale_dtype)
                codes = to_codes(grouped(weight, group), scale, zero, scheme)
                ones = torch.ones_like(scale)
                ours = clipped_grid(weight, ones, ones, scheme, scale_dtype=scale_dtype, dtype=torch.float32)
                theirs = reference(weight, scheme, group, scale_dtype)
                case = f"{what}, {rows} x {width}, group {group}"
                assert torch.equal(scale, theirs[0]), case
                assert torch.equal(zero.to(torch.int8), theirs[1]), case
                assert torch.equal(codes.flatten(1).to(torch.int8), theirs[2]), case
                assert torch.equal(ours, theirs[3]), case
                assert torch.equal(from_codes(codes, scale, zero).flatten(1), theirs[3]), case


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_huge_weights_equal_compressed_tensors(symmetric: bool) -> None:
    scheme = Scheme(bits=4, group_size=-1, symmetric=symmetric)
    weight = next(weights(3, 16, scheme))[1] * 1e8
    ones = torch.ones(3, 1)
    ours = clipped_grid(weight, ones, ones, scheme, scale_dtype=torch.float16, dtype=torch.float32)
    assert torch.equal(ours, reference(weight, scheme, 16, torch.float16)[3])


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_ties_round_to_even(symmetric: bool) -> None:
    scheme = Scheme(bits=4, group_size=-1, symmetric=symmetric)
    weight = half_steps(1, 16, scheme)
    scale, zero = qparams(*ranges(grouped(weight, 16)), scheme, torch.float32)
    assert scale.item() == 0.125
    codes = to_codes(grouped(weight, 16), scale, zero, scheme).flatten()[2:8]
    assert len(codes.unique()) > 3
    assert torch.all(codes % 2 == 0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_zero_stays_zero_and_codes_fit(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=8, symmetric=symmetric)
    for _, weight in weights(4, 48, scheme):
        weight = torch.where(torch.arange(48) % 5 == 0, 0.0, weight)
        scale, zero = qparams(*ranges(grouped(weight, 8)), scheme, torch.float32)
        codes = to_codes(grouped(weight, 8), scale, zero, scheme)
        assert scheme.qmin <= zero.min() and zero.max() <= scheme.qmax
        assert scheme.qmin <= codes.min() and codes.max() <= scheme.qmax
        assert torch.all(from_codes(codes, scale, zero).flatten(1)[weight == 0] == 0)


class Round(torch.autograd.Function):
    """Rounding whose gradient is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def straight_through(
    weight: Tensor, low_factor: Tensor, high_factor: Tensor, offset: Tensor | None = None, *, scheme: Scheme
) -> Tensor:
    """The formula of the papers, left to autograd: clipping, and an offset of rounding where there is one."""
    view = weight.unflatten(1, (low_factor.shape[1], -1))
    low = view.amin(-1, keepdim=True).clamp(max=0) * low_factor.unsqueeze(-1)
    high = view.amax(-1, keepdim=True).clamp(min=0) * high_factor.unsqueeze(-1)
    steps = scheme.qmax - scheme.qmin
    if scheme.symmetric:
        scale, zero = torch.maximum(-low, high) / (steps / 2), torch.zeros_like(low)
    else:
        scale = (high - low) / steps
        zero = (scheme.qmin - low / scale).clamp(scheme.qmin, scheme.qmax).round().detach()
    moved = view / scale if offset is None else view / scale + offset.view_as(view)
    rounded: Any = Round.apply(moved + zero)
    return ((rounded.clamp(scheme.qmin, scheme.qmax) - zero) * scale).flatten(1)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().clone().requires_grad_() for tensor in tensors]


def assert_same_gradients(weight: Tensor, low: Tensor, high: Tensor, *offset: Tensor, scheme: Scheme) -> None:
    ours, theirs = leaves(weight, low, high, *offset), leaves(weight, low, high, *offset)
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = ours[3] if offset else None
    closed = clipped_grid(
        ours[0], ours[1], ours[2], scheme, offset_OI=moved, scale_dtype=torch.float64, dtype=torch.float64
    )
    written_out = straight_through(theirs[0], theirs[1], theirs[2], *theirs[3:], scheme=scheme)
    assert torch.equal(closed, written_out)
    got, want = torch.autograd.grad(closed, ours, pull), torch.autograd.grad(written_out, theirs, pull)
    for name, a, b in zip(("weight", "low factor", "high factor", "offset"), got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("group", [8, 48])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradient_is_straight_through(bits: int, symmetric: bool, group: int) -> None:
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 48, generator=generator, dtype=torch.float64)
    low, high = (0.6 + 0.39 * torch.rand(6, 48 // group, generator=generator, dtype=torch.float64) for _ in range(2))
    one_sided = weight.abs() + 0.1
    for matrix in (weight, one_sided, -one_sided):
        assert_same_gradients(matrix, low, high, scheme=scheme)
        assert_same_gradients(matrix, torch.ones_like(low), torch.ones_like(high), scheme=scheme)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradient_of_learned_rounding_is_straight_through(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 48, generator=generator, dtype=torch.float64)
    low, high = (0.6 + 0.39 * torch.rand(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    offset = torch.rand(6, 48, generator=generator, dtype=torch.float64) - 0.5
    assert_same_gradients(weight, low, high, offset, scheme=scheme)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_weights_that_share_an_end_share_its_gradient(symmetric: bool) -> None:
    scheme = Scheme(bits=3, group_size=8, symmetric=symmetric)
    row = torch.tensor([-1.3, -1.3, -1.3, 0.2, 0.7, 0.9, 0.9, 0.05], dtype=torch.float64)
    with_zeros = torch.tensor([0.0, 0.0, 1.1, 0.2, 0.7, 0.9, 1.1, 0.05], dtype=torch.float64)
    weight = torch.stack([row, -row, with_zeros, -with_zeros])
    low, high = torch.full((4, 1), 0.91), torch.full((4, 1), 0.87)
    assert_same_gradients(weight, low, high, scheme=scheme)
    (ours,) = leaves(weight)
    clipped_grid(ours, low.double(), high.double(), scheme, scale_dtype=torch.float64, dtype=torch.float64)[
        0, 3:
    ].sum().backward()
    assert ours.grad is not None
    # Nothing was asked of these three but that they set the range, so they get the same, and it is not nothing.
    assert ours.grad[0, 0] != 0
    assert torch.equal(ours.grad[0, :3], ours.grad[0, :1].expand(3))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_clipped_weights_follow_the_factor_exactly(symmetric: bool) -> None:
    """Outside the range nothing is rounded, so the gradient there is the true slope: compare finite differences."""
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = leaves(torch.full((4, 1), 0.55), torch.full((4, 1), 0.6))

    def clipped_sum(low: Tensor, high: Tensor) -> Tensor:
        grid = clipped_grid(weight, low, high, scheme, scale_dtype=torch.float64, dtype=torch.float64)
        scale, zero = qparams(
            weight.amin(1, keepdim=True) * 0.55, weight.amax(1, keepdim=True) * 0.6, scheme, torch.float64
        )
        codes = (weight / scale + zero).round()
        clipped = (codes < scheme.qmin) | (codes > scheme.qmax)
        assert clipped.any(1).all()
        return (grid * clipped).sum()

    clipped_sum(low, high).backward()
    step = 1e-7
    for factor, other_low, other_high in ((low, step, 0.0), (high, 0.0, step)):
        assert factor.grad is not None
        with torch.no_grad():
            up = clipped_sum(low + other_low, high + other_high)
            down = clipped_sum(low - other_low, high - other_high)
        torch.testing.assert_close(factor.grad.sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def test_forward_and_backward_leave_their_inputs_alone() -> None:
    scheme = Scheme(bits=3, group_size=16)
    weight = torch.randn(4, 32, requires_grad=True)
    factor = torch.full((4, 2), 0.9, requires_grad=True)
    pull = torch.randn(4, 32)
    copies = [tensor.detach().clone() for tensor in (weight, factor, pull)]
    out = clipped_grid(weight, factor, factor, scheme, scale_dtype=torch.bfloat16, dtype=torch.float32)
    torch.autograd.grad(out, (weight, factor), pull)
    for tensor, copy in zip((weight, factor, pull), copies, strict=True):
        assert torch.equal(tensor.detach(), copy)


def test_gradients_keep_fp32_under_a_bf16_forward() -> None:
    scheme = Scheme(bits=3, group_size=16)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = weight.clone().requires_grad_()
        factor = torch.full((4, 2), 0.9, requires_grad=True)
        out = clipped_grid(leaf, factor, factor, scheme, scale_dtype=torch.bfloat16, dtype=dtype)
        assert out.dtype == dtype
        grads.append(torch.autograd.grad(out, (leaf, factor), pull.to(dtype)))
    for low_precision, full in zip(*grads, strict=True):
        assert low_precision.dtype == torch.float32
        assert torch.equal(low_precision, full)


def test_tokens_are_rounded_as_a_runtime_does() -> None:
    hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)) * 4
    hidden_BTD[0, 1] = 0
    args = QuantizationArgs(num_bits=8, symmetric=True, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    scale, zero = calculate_qparams(hidden_BTD.amin(-1, keepdim=True), hidden_BTD.amax(-1, keepdim=True), args)
    rounded_BTD = round_tokens(hidden_BTD, 8)
    torch.testing.assert_close(rounded_BTD, fake_quantize(hidden_BTD, scale, zero, args), rtol=1e-6, atol=1e-6)
    assert not torch.equal(rounded_BTD, hidden_BTD)
    assert round_tokens(hidden_BTD.bfloat16(), 8).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_scales_in_bfloat16_are_float16_numbers_too(bits: int, symmetric: bool) -> None:
    """Else a group of a dead neuron keeps a solved model out of every format whose scales are float16."""
    scheme = Scheme(bits=bits, group_size=-1, symmetric=symmetric)
    ends = torch.logspace(-12, -2, 200).unsqueeze(1)
    scale, zero = qparams(-ends, 0.7 * ends, scheme, torch.bfloat16)
    stepped, _ = stored(ends, zero, scheme, torch.bfloat16)
    for found in (scale, stepped):
        assert torch.equal(found.half().float(), found) and torch.equal(found.bfloat16().float(), found)
        assert found.min() > 0
    assert torch.equal(stored(scale, zero, scheme, torch.bfloat16)[0], scale)
