"""Band products equal dense ones, and never form the dense core."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from makeweight.numerics.band import band_of_product, band_to_dense, band_update, times_band

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
RANKS, BANDS, ROWS = st.integers(1, 90), st.integers(0, 95), st.integers(1, 7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(rows, rank, seed=seed))[0]


def dense_mask(rank: int, band: int) -> Tensor:
    index = torch.arange(rank)
    return (index.unsqueeze(1) - index).abs() <= band


def band_of(dense: Tensor, band: int) -> Tensor:
    """Read a band off a square matrix, one diagonal at a time."""
    rank = dense.shape[0]
    out = dense.new_zeros(rank, 2 * band + 1)
    for offset in range(-min(band, rank - 1), min(band, rank - 1) + 1):  # offset is row minus column
        line = torch.diagonal(dense, -offset)
        first = max(0, -offset)
        out[first : first + len(line), offset + band] = line
    return out


def band_mask(rank: int, band: int) -> Tensor:
    """Return which entries of a band lie inside the matrix."""
    return band_of(torch.ones(rank, rank), band).bool()


def random_band(rank: int, band: int) -> Tensor:
    return random(rank, 2 * band + 1) * band_mask(rank, band)


@settings(max_examples=60, deadline=None)
@given(rank=RANKS, band=BANDS)
@example(rank=1, band=0)
@example(rank=5, band=4)
@example(rank=5, band=9)
def test_dense_form(rank: int, band: int) -> None:
    entries = random_band(rank, band)
    dense = band_to_dense(entries)
    assert not dense[~dense_mask(rank, band)].any()
    assert torch.equal(band_of(dense, band), entries)


@settings(max_examples=80, deadline=None)
@given(rank=RANKS, band=BANDS, rows=ROWS)
@example(rank=1, band=0, rows=1)
@example(rank=64, band=16, rows=3)
@example(rank=65, band=16, rows=3)
@example(rank=33, band=1, rows=3)
@example(rank=40, band=39, rows=2)
def test_times_band(rank: int, band: int, rows: int) -> None:
    factor, entries = random(rows, rank, seed=1), random_band(rank, band)
    torch.testing.assert_close(times_band(factor, entries), factor @ band_to_dense(entries), **CLOSE)


@settings(max_examples=80, deadline=None)
@given(rank=RANKS, band=BANDS, inner=ROWS)
@example(rank=1, band=0, inner=1)
@example(rank=64, band=16, inner=3)
@example(rank=65, band=16, inner=3)
@example(rank=40, band=39, inner=2)
def test_band_of_product(rank: int, band: int, inner: int) -> None:
    left, right = random(inner, rank, seed=1), random(inner, rank, seed=2)
    got = band_of_product(left, right, band)
    torch.testing.assert_close(got, band_of(left.T @ right, band), **CLOSE)
    assert not got[~band_mask(rank, band)].any()


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 48), band=st.integers(0, 47), taller=st.integers(0, 9), wider=st.integers(0, 9))
@example(rank=40, band=0, taller=0, wider=0)
@example(rank=40, band=39, taller=3, wider=0)
def test_update_norm_and_gradient(rank: int, band: int, taller: int, wider: int) -> None:
    u, v = orthonormal(rank + taller, rank, 1), orthonormal(rank + wider, rank, 2)
    entries = random_band(rank, band).requires_grad_()
    update = band_update(entries, u, v)
    turn = (lambda core: core.T) if taller > wider else (lambda core: core)
    torch.testing.assert_close(update, u @ turn(band_to_dense(entries.detach())) @ v.T, **CLOSE)
    torch.testing.assert_close(update.norm(), entries.norm(), **CLOSE)
    pull = random(*update.shape, seed=3)
    (grad,) = torch.autograd.grad(update, entries, pull)
    torch.testing.assert_close(grad, band_of(turn(u.T @ pull @ v), band), **CLOSE)


@pytest.mark.parametrize("band", [0, 1, 3, 40])
def test_gradcheck(band: int) -> None:
    u, v = orthonormal(43, 41, 1), orthonormal(41, 41, 2)
    mask = band_mask(41, band)
    leaf = random_band(41, band).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: band_update(d * mask, u, v), (leaf,), fast_mode=True)


def test_the_whole_band_reaches_every_matrix() -> None:
    rank = 37
    u, v, goal = orthonormal(rank, rank, 1), orthonormal(rank, rank, 2), random(rank, rank, seed=3)
    entries = band_of(u.T @ goal @ v, rank - 1)
    torch.testing.assert_close(band_update(entries, u, v), goal, **CLOSE)


def test_precisions_stay_apart() -> None:
    u, v = orthonormal(40, 36, 1).bfloat16(), orthonormal(36, 36, 2).bfloat16()
    entries = random_band(36, 2).float().requires_grad_()
    update = band_update(entries, u, v)
    assert update.dtype == torch.bfloat16
    update.float().square().sum().backward()
    assert entries.grad is not None and entries.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remembers the largest storage any operation wrote."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("band", [0, 2, 16])
def test_the_core_is_never_formed(band: int) -> None:
    rank, rows = 3000, 4
    u, v = random(rows, rank).float(), random(rows, rank, seed=1).float()
    entries = random_band(rank, band).float().requires_grad_()
    with Largest() as seen:
        band_update(entries, u, v).sum().backward()
    assert 0 < seen.size < rank * rank / 40
