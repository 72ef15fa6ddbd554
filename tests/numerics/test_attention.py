"""Causal attention by stretches: torch's own values and gradients, and nothing from later tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from makeweight.numerics import attention
from makeweight.numerics.attention import causal_attention, last_token_attention

# tokens, heads, heads of keys, width of keys, width of values
SHAPES = [(1, 2, 2, 8, 8), (7, 4, 2, 8, 8), (64, 6, 2, 16, 16), (150, 3, 1, 8, 12), (200, 4, 4, 16, 16)]


def problem(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return queries, keys and values that learn, and the slope of a loss in the output."""
    tokens, heads, keys, width, values = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, width), (keys, width), (keys, values), (heads, values))
    *leaves, slope = (torch.randn(2, n, tokens, d, generator=generator, dtype=torch.float64) for n, d in sizes)
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], slope.to(dtype)


def ours(leaves: list[Tensor], slope: Tensor, scale: float = 0.3) -> list[Tensor]:
    """Return the output and the three gradients."""
    query, key, value = leaves
    out = causal_attention(query, key, value, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def theirs(leaves: list[Tensor], slope: Tensor, scale: float = 0.3) -> list[Tensor]:
    """Return the same of torch's function, with keys and values repeated."""
    query, key, value = leaves
    times = query.shape[1] // key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), is_causal=True, scale=scale
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0, 1 << 27])
def test_values_and_gradients_are_exact(
    shape: tuple[int, int, int, int, int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEPT_BYTES", kept)
    leaves, slope = problem(shape, torch.float64)
    for got, want in zip(ours(leaves, slope), theirs(leaves, slope), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_token_alone_sees_what_it_sees_among_all(shape: tuple[int, int, int, int, int]) -> None:
    (query, key, value), _ = problem(shape, torch.float64)
    among_all = causal_attention(query, key, value, 0.3)[:, :, -1:]
    torch.testing.assert_close(
        last_token_attention(query[:, :, -1:], key, value, 0.3), among_all, rtol=1e-11, atol=1e-12
    )


def test_computing_probabilities_again_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, slope = problem((150, 6, 2, 16, 16), torch.bfloat16)
    kept = ours(leaves, slope)
    monkeypatch.setattr(attention, "KEPT_BYTES", 0)
    assert all(map(torch.equal, ours(leaves, slope), kept))


def test_bfloat16_is_as_close_to_float64_as_torch_is_also_under_autocast() -> None:
    leaves, slope = problem((200, 6, 2, 64, 64), torch.bfloat16)
    exact = theirs([leaf.detach().double().requires_grad_() for leaf in leaves], slope.double())

    def errors(found: list[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    plain = ours(leaves, slope)
    for mine, torchs in zip(errors(plain), errors(theirs(leaves, slope)), strict=True):
        assert mine < 1.5 * torchs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, ours(leaves, slope), plain))


def test_later_tokens_change_nothing() -> None:
    leaves, _ = problem((100, 4, 2, 8, 8), torch.bfloat16)
    query, key, value = (leaf.detach() for leaf in leaves)
    before = causal_attention(query, key, value, 0.3)
    key[:, :, 70:], value[:, :, 70:] = 9.0, -9.0
    after = causal_attention(query, key, value, 0.3)
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert not torch.equal(before[:, :, 70:], after[:, :, 70:])
