"""Gradients that know what a flip costs, against losses whose slopes are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from makeweight.numerics.flips import Curvature, Flips
from makeweight.numerics.grid import clipped_grid
from makeweight.numerics.scheme import Scheme

SCHEME = Scheme(bits=3, group_size=16, symmetric=True)


def a_matrix() -> tuple[Tensor, Curvature]:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(6, 48, generator=generator, dtype=torch.float64)
    column_O1 = 0.1 + torch.rand(6, 1, generator=generator, dtype=torch.float64)
    return weight_OI, (column_O1, 0.1 + torch.rand(48, generator=generator, dtype=torch.float64))


def quantized(weight_OI: Tensor, factor_OG: Tensor, offset_OI: Tensor | None = None, flips: Flips | None = None):  # noqa: ANN201
    return clipped_grid(
        weight_OI,
        factor_OG,
        factor_OG,
        SCHEME,
        offset_OI=offset_OI,
        flips=flips,
        scale_dtype=torch.float64,
        dtype=torch.float64,
    )


def quadratic(weight_OI: Tensor, curvature: Curvature) -> Callable[[Tensor], Tensor]:
    """Half the sum of h (w_hat - w)^2: a loss in which no weight touches another."""
    column_O1, row_I = curvature
    return lambda rounded_OI: (column_O1 * row_I * (rounded_OI - weight_OI).square()).sum() / 2


def slopes(loss: Callable[[Tensor], Tensor], factor: float, flips: Flips | None) -> tuple[Tensor, Tensor]:
    """Return the gradients along range factors and along offsets that are all zero."""
    weight_OI, _ = a_matrix()
    factor_OG = torch.full((6, 3), factor, dtype=torch.float64, requires_grad=True)
    offset_OI = torch.zeros_like(weight_OI, requires_grad=True)
    found = torch.autograd.grad(loss(quantized(weight_OI, factor_OG, offset_OI, flips)), (factor_OG, offset_OI))
    return found[0], found[1]


@pytest.mark.parametrize("factor", [0.95, 0.7])
def test_weights_that_do_not_touch_get_the_exact_slope(factor: float) -> None:
    weight_OI, curvature = a_matrix()
    loss = quadratic(weight_OI, curvature)
    along_range, along_offset = slopes(loss, factor, Flips(curvature))
    for row in range(6):
        for group in range(3):
            step = torch.zeros(6, 3, dtype=torch.float64)
            step[row, group] = 1e-7
            ahead, behind = (loss(quantized(weight_OI, factor + sign * step)) for sign in (1, -1))
            torch.testing.assert_close(along_range[row, group], (ahead - behind) / 2e-7, rtol=1e-5, atol=1e-7)
    assert along_offset.abs().max() < 1e-12  # rounding to nearest is best: nothing asks for another code
    assert slopes(loss, factor, None)[1].abs().max() > 1e-3  # straight-through sends weights to where they flip
    assert not torch.allclose(slopes(loss, factor, None)[0], along_range, rtol=0.1)


def test_what_others_ask_is_left_as_it_is() -> None:
    _, curvature = a_matrix()
    pull_OI = torch.randn(6, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nothing = (torch.zeros_like(curvature[0]), curvature[1])
    plain = slopes(lambda rounded_OI: (pull_OI * rounded_OI).sum(), 0.8, None)
    for flips in (Flips(nothing), Flips(curvature, own=0.0)):
        for ours, theirs in zip(slopes(lambda rounded: (pull_OI * rounded).sum(), 0.8, flips), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_damping_is_a_term_of_the_loss(offset: float) -> None:
    weight_OI, (column_O1, row_I) = a_matrix()
    pull_OI = torch.randn(6, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for flips, term in ((Flips((column_O1, row_I), damp=0.5), 0.0), (Flips((1.5 * column_O1, row_I)), 0.5)):
        leaves = (weight_OI.clone(), torch.full((6, 3), 0.7).double(), torch.full_like(weight_OI, offset))
        weight, factor_OG, offset_OI = (leaf.requires_grad_() for leaf in leaves)
        rounded_OI = quantized(weight, factor_OG, offset_OI, flips)
        loss = (pull_OI * rounded_OI).sum() + term * quadratic(weight_OI, (column_O1, row_I))(rounded_OI)
        found.append(torch.autograd.grad(loss, (weight, factor_OG, offset_OI)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
