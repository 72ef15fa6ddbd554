"""Chosen ranges: never worse than the full one by their own measure, and equal to plain references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from makeweight.numerics import search
from makeweight.numerics.grid import from_codes, grouped, qparams, ranges, to_codes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.search import best_factors, half_quadratic, power_error, quantile_factors

SHARES = tuple(1 - 0.1 * i for i in range(8))
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def groups(kind: str, *, seed: int = 0, rows: int = 12, group: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, 4, group, generator=generator, dtype=torch.float64)
    if kind == "heavy":
        normal = normal / torch.randn(rows, 4, group, generator=generator, dtype=torch.float64).abs().sqrt()
    elif kind == "one-sided":
        normal = normal.abs()
    elif kind == "zeros":
        normal[:, ::2] = 0
    elif kind == "tiny":
        normal = normal * 1e-9
    return (normal * 0.02).to(dtype)


def error_of(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, power: float) -> Tensor:
    return (from_codes(to_codes(weight, scale, zero, scheme), scale, zero) - weight).abs().pow(power).sum(-1)


KINDS = ("normal", "heavy", "one-sided", "zeros", "tiny")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    power=st.sampled_from((1.0, 2.0, 2.4)),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    seed=st.integers(0, 99),
)
def test_the_best_share_is_the_best_of_all_for_every_group(
    kind: str, bits: int, symmetric: bool, power: float, scale_dtype: torch.dtype, seed: int
) -> None:
    weight, scheme = groups(kind, seed=seed), Scheme(bits=bits, group_size=32, symmetric=symmetric)
    before = weight.clone()
    factor = best_factors(
        weight, scheme, scale_dtype, shares=SHARES, error=lambda delta: power_error(delta, power)
    ).unsqueeze(0)
    assert torch.equal(weight, before)
    low, high = ranges(weight)
    all_errors = torch.stack(
        [error_of(weight, *qparams(low * s, high * s, scheme, scale_dtype), scheme, power) for s in SHARES]
    )
    found = error_of(weight, *qparams(low * factor[0], high * factor[0], scheme, scale_dtype), scheme, power)
    torch.testing.assert_close(found, all_errors.amin(0), rtol=1e-4, atol=0)
    assert torch.all(found <= all_errors[0]), "never worse than round-to-nearest"


def test_the_widest_of_equals_wins_and_nothing_beats_a_number_that_is_none() -> None:
    scheme = Scheme(bits=4, group_size=32)
    weight = groups("normal")
    assert torch.all(best_factors(weight, scheme, torch.float32, shares=SHARES, error=lambda d: d[..., 0] * 0) == 1)
    nan = best_factors(weight, scheme, torch.float32, shares=SHARES, error=lambda d: d[..., 0] * torch.nan)
    assert torch.all(nan == 1)


def test_errors_may_look_at_inputs() -> None:
    """AWQ's: the error of the outputs of each group, for inputs of which one is far larger than the rest."""
    scheme = Scheme(bits=3, group_size=32)
    weight = groups("heavy", dtype=torch.float64)
    inputs_TGS = torch.randn(64, 4, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs_TGS[..., 3] *= 30

    def outputs(delta_OGS: Tensor) -> Tensor:
        return torch.einsum("ogs,tgs->otg", delta_OGS, inputs_TGS).square().sum(1)

    low, high = ranges(weight)
    errors = []
    for error in (outputs, lambda delta: power_error(delta, 2)):
        factor = best_factors(weight, scheme, torch.float32, shares=SHARES, error=error)
        scale, zero = qparams(low * factor, high * factor, scheme, torch.float32)
        errors.append(outputs(from_codes(to_codes(weight, scale, zero, scheme), scale, zero) - weight))
    assert torch.all(errors[0] <= errors[1]) and errors[0].sum() < 0.8 * errors[1].sum()


@pytest.mark.parametrize("share", [0.51, 0.75, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("group", [2, 64, 257])
def test_quantiles_are_torchs(group: int, share: float) -> None:
    weight = torch.randn(20, 3, group, generator=torch.Generator().manual_seed(group), dtype=torch.float64)
    low, high = ranges(weight)
    low_factor, high_factor = quantile_factors(weight, share)
    below, above = weight.quantile(1 - share, -1).clamp(max=0), weight.quantile(share, -1).clamp(min=0)
    kept = (below == 0) & (above == 0)
    torch.testing.assert_close(low * low_factor, torch.where(kept, low, below), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(high * high_factor, torch.where(kept, high, above), rtol=1e-12, atol=1e-12)
    for factor in (low_factor, high_factor):
        assert factor.min() >= 0 and factor.max() <= 1
        assert share < 1 or torch.all(factor == 1)


def test_a_group_of_one_outlier_keeps_its_range() -> None:
    weight = torch.zeros(2, 1, 64)
    weight[0, 0, 5] = 3.0
    assert all(torch.all(factor == 1) for factor in quantile_factors(weight, 0.9))


@settings(max_examples=60, deadline=None)
@example(kind="one-sided", bits=8, power=0.5, scale_dtype=torch.float32, seed=55)  # of a weight nearly on the grid
@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    power=st.sampled_from((0.5, 0.7, 0.9)),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    seed=st.integers(0, 99),
)
def test_half_quadratic_is_never_worse_and_can_be_stored(
    kind: str, bits: int, power: float, scale_dtype: torch.dtype, seed: int
) -> None:
    weight, scheme = groups(kind, seed=seed), Scheme(bits=bits, group_size=32)
    scale, zero = half_quadratic(weight, scheme, scale_dtype, power=power, steps=8)
    assert torch.equal(scale, scale.to(scale_dtype).float()) and (scale > 0).all()
    assert torch.equal(zero, zero.round()) and scheme.qmin <= zero.min() and zero.max() <= scheme.qmax
    start = error_of(weight, *qparams(*ranges(weight), scheme, scale_dtype), scheme, power)
    assert torch.all(error_of(weight, scale, zero, scheme, power) <= start)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.85), (3, 0.93), (4, 0.98)])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_half_quadratic_is_nearer_by_its_own_measure(kind: str, bits: int, share: float) -> None:
    weight, scheme = groups(kind, rows=64, group=64), Scheme(bits=bits, group_size=64)
    plain = error_of(weight, *qparams(*ranges(weight), scheme, torch.float16), scheme, 0.7).mean()
    found = half_quadratic(weight, scheme, torch.float16, power=0.7, steps=20)
    assert error_of(weight, *found, scheme, 0.7).mean() < share * plain


def test_half_quadratic_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = groups("heavy"), Scheme(bits=3, group_size=32)
    whole = half_quadratic(weight, scheme, torch.float16, power=0.7, steps=5)
    monkeypatch.setattr(search, "CHUNK", weight[0].numel() * 5)
    parts = half_quadratic(weight, scheme, torch.float16, power=0.7, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_weights_on_a_grid_are_left_there() -> None:
    codes = torch.arange(-8, 8, dtype=torch.float64).repeat(4, 2, 2)
    weight, scheme = (codes - 3) * 0.25, Scheme(bits=4, group_size=32)
    scale, zero = half_quadratic(weight, scheme, torch.float64, power=0.7, steps=20)
    assert torch.equal(from_codes(to_codes(weight, scale, zero, scheme), scale, zero), weight)
    assert torch.all(best_factors(weight, scheme, torch.float64, shares=SHARES, error=lambda d: power_error(d, 2)) == 1)
    assert torch.equal(grouped(weight.flatten(1), 32), weight)
