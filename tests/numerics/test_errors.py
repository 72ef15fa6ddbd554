"""Every token counts once, whatever its size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from makeweight.numerics.errors import token_error


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(seed))


def test_one_massive_token_does_not_rule() -> None:
    """One token in 100 is a thousand times larger; errors elsewhere double."""
    target = hidden()
    target[0, 0] *= 1000
    output = target * 1.1
    worse = output.clone()
    worse.view(-1, 16)[1:] = target.view(-1, 16)[1:] * (1 + 0.1 * math.sqrt(2))

    def plain(output: Tensor) -> float:
        return float((output - target).square().sum() / target.square().sum())

    assert float(token_error(output, target)) == pytest.approx(0.01, rel=1e-3)
    # Ninety-nine of a hundred tokens got twice as bad: this error shows it, plain relative squared error does not.
    assert float(token_error(worse, target)) == pytest.approx(0.01 * (1 + 0.99), rel=1e-3)
    assert plain(worse) == pytest.approx(plain(output), rel=1e-3)


def test_no_token_weighs_more_than_its_share() -> None:
    target = hidden()
    target[0, 0] *= 1000
    output = target.clone()
    output[0, 0] = 0
    assert float(token_error(output, target)) == pytest.approx(1 / 100, rel=1e-5)


def test_a_lost_token_pulls_less_than_others_and_is_still_pulled() -> None:
    """One token in 100 is a hundred times larger than it should be, the others are off by a tenth."""
    target = hidden()
    output = (target * 1.1).requires_grad_(True)
    lost = output.detach().clone()
    lost[0, 0] = target[0, 0] * 100
    lost.requires_grad_(True)
    error = token_error(lost, target)
    assert error.item() == pytest.approx((99 * 0.01 + 1 + math.log(99**2)) / 100, rel=1e-4)
    slope, usual = (torch.autograd.grad(token_error(x, target), x)[0] for x in (lost, output))
    assert torch.equal(slope.view(-1, 16)[1:], usual.view(-1, 16)[1:])
    assert 0 < float(slope[0, 0].norm()) < 0.2 * float(usual[0, 0].norm())


def test_outputs_that_are_far_from_all_targets_have_a_slope() -> None:
    target = hidden()
    output = (target * 30).requires_grad_(True)
    (slope,) = torch.autograd.grad(token_error(output, target), output)
    assert float((slope * target).sum()) > 0


def test_the_slope_is_finite_at_no_error_and_one_at_the_bound() -> None:
    """Where an output is zero its ratio is one: the slope is that of the plain ratio."""
    target = hidden()
    output = target.clone()
    output[0, 0] = 0
    output.requires_grad_(True)
    (slope,) = torch.autograd.grad(token_error(output, target), output)
    assert slope.isfinite().all()
    expected = -2 * target[0, 0] / target[0, 0].square().sum() / 100
    torch.testing.assert_close(slope[0, 0], expected, rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(token=st.integers(0, 99), size=st.sampled_from([1e-3, 0.1, 7.0, 1e4]), seed=st.integers(0, 5))
def test_a_tokens_size_does_not_matter(token: int, size: float, seed: int) -> None:
    target, output = hidden(seed), hidden(seed) + 0.1 * hidden(seed + 10)
    before = token_error(output, target)
    target.view(-1, 16)[token] *= size
    output.view(-1, 16)[token] *= size
    torch.testing.assert_close(token_error(output, target), before, rtol=1e-4, atol=1e-7)


def test_zero_only_where_equal_and_finite_where_the_target_is_zero() -> None:
    target = hidden()
    assert float(token_error(target, target)) == 0
    output = target.clone()
    output[1, 3, 4] += 0.5
    assert float(token_error(output, target)) > 0
    target[0, 0] = 0
    assert math.isfinite(float(token_error(output, target)))
    output[0, 0] = 0
    assert float(token_error(output, target)) == pytest.approx(0.25 / float(target[1, 3].square().sum()) / 100)


def test_low_precision_is_summed_in_fp32() -> None:
    target = hidden().bfloat16()
    output = (hidden() * 1.02).bfloat16()
    error = token_error(output, target)
    assert error.dtype == torch.float32
    assert torch.equal(error, token_error(output.float(), target.float()))
