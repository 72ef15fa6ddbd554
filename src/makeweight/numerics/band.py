"""Products with a band matrix between two orthonormal factors, at the cost of the band.

The core of Singular-value Diagonal Expansion is dW = U B V^T with B an R x R matrix that is zero outside
|i - j| <= b. B is held as its diagonals, (W, R) with W = 2 b + 1: `diagonals[k, j]` is B[j + k - b, j], and entries
that would lie outside the matrix stay zero. Columns are worked on in tiles of `tile`, each of which touches
`tile + 2 b` neighbouring rows only, so that both directions are batched matrix products and neither the R x R core
nor its gradient is formed. Where a tile would reach across the whole matrix, the band is written out instead: it then
is most of the core, and one plain product is cheaper.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def band_size(rank: int, band: int) -> int:
    """Return the number of free entries, R (2 b + 1) - b (b + 1)."""
    return rank * (2 * band + 1) - band * (band + 1)


def band_mask(rank: int, band: int, device: torch.device | None = None) -> Tensor:
    """Return which entries of the (W, R) diagonals lie inside the matrix, as booleans."""
    rows_WR = torch.arange(rank, device=device) + torch.arange(-band, band + 1, device=device).unsqueeze(1)
    return (rows_WR >= 0) & (rows_WR < rank)


def band_to_dense(diagonals_WR: Tensor) -> Tensor:
    """Write the band out as an R x R matrix."""
    width, rank = diagonals_WR.shape
    band = width // 2
    padded_RR = diagonals_WR.new_zeros(rank + 2 * band, rank)
    padded_RR.scatter_(0, _tile_rows(rank, band, diagonals_WR.device), diagonals_WR)
    return padded_RR[band : band + rank]


def dense_to_band(dense_RR: Tensor, band: int) -> Tensor:
    """Read the (W, R) diagonals of an R x R matrix, zero where they leave it."""
    padded_RR = F.pad(dense_RR, (0, 0, band, band))
    return padded_RR.gather(0, _tile_rows(dense_RR.shape[1], band, dense_RR.device))


@lru_cache(maxsize=64)
def _tile_rows(tile: int, band: int, device: torch.device) -> Tensor:
    """Return for (k, column) of a tile the row inside its window of tile + 2 b rows: column + k."""
    return torch.arange(tile, device=device) + torch.arange(2 * band + 1, device=device).unsqueeze(1)


def _tile_of(band: int) -> int:
    """Choose a tile that keeps the padding (2 b of tile + 2 b rows) small and the products large."""
    return max(32, 2 * band)


def _windows(factor_MR: Tensor, band: int, tile: int) -> Tensor:
    """Cut the columns of a factor into overlapping windows, shape (tiles, M, tile + 2 b)."""
    rank = factor_MR.shape[1]
    tiles = -(-rank // tile)
    padded = F.pad(factor_MR, (band, tiles * tile - rank + band))
    return padded.unfold(1, tile + 2 * band, tile).transpose(0, 1)


def _tiled_band(diagonals_WR: Tensor, tile: int) -> Tensor:
    """Lay the diagonals out as one small matrix per tile, shape (tiles, tile + 2 b, tile)."""
    width, rank = diagonals_WR.shape
    band, tiles = width // 2, -(-rank // tile)
    padded = F.pad(diagonals_WR, (0, tiles * tile - rank)).view(width, tiles, tile).transpose(0, 1)
    blocks = diagonals_WR.new_zeros(tiles, tile + 2 * band, tile)
    return blocks.scatter_(1, _tile_rows(tile, band, diagonals_WR.device).expand(tiles, -1, -1), padded)


def times_band(factor_MR: Tensor, diagonals_WR: Tensor) -> Tensor:
    """Multiply (M, R) by the band matrix without forming it, shape (M, R)."""
    rank, band = diagonals_WR.shape[1], diagonals_WR.shape[0] // 2
    if band == 0:
        return factor_MR * diagonals_WR
    tile = _tile_of(band)
    if tile + 2 * band >= rank:
        return factor_MR @ band_to_dense(diagonals_WR)
    product = torch.bmm(_windows(factor_MR, band, tile), _tiled_band(diagonals_WR, tile))
    return product.transpose(0, 1).flatten(1)[:, :rank]


def band_of_product(left_RM: Tensor, right_MR: Tensor, band: int) -> Tensor:
    """Return the band of left @ right without forming the rest, as (W, R) diagonals."""
    rank = left_RM.shape[0]
    if band == 0:
        return (left_RM * right_MR.T).sum(1).unsqueeze(0)
    tile = _tile_of(band)
    if tile + 2 * band >= rank:
        return dense_to_band(left_RM @ right_MR, band)
    tiles = -(-rank // tile)
    right = F.pad(right_MR, (0, tiles * tile - rank)).unflatten(1, (tiles, tile)).transpose(0, 1)
    blocks = torch.bmm(_windows(left_RM.T, band, tile).transpose(1, 2), right)
    diagonals = blocks.gather(1, _tile_rows(tile, band, left_RM.device).expand(tiles, -1, -1))
    diagonals_WR = diagonals.transpose(0, 1).flatten(1)[:, :rank]
    return diagonals_WR * band_mask(rank, band, left_RM.device)


class _BandUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, diagonals_WR: Tensor, u_OR: Tensor, v_IR: Tensor) -> Tensor:
        ctx.save_for_backward(u_OR, v_IR)
        ctx.band, ctx.dtype = diagonals_WR.shape[0] // 2, diagonals_WR.dtype
        return times_band(u_OR, diagonals_WR.to(u_OR.dtype)) @ v_IR.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u_OR, v_IR = ctx.saved_tensors
        a_RI = u_OR.T @ grads[0].to(u_OR.dtype)
        return band_of_product(a_RI, v_IR, ctx.band).to(ctx.dtype), None, None


def band_update(diagonals_WR: Tensor, u_OR: Tensor, v_IR: Tensor) -> Tensor:
    """Return dW = U B V^T, shape (O, I) in the factors' dtype; the gradient reaches the diagonals only.

    Forward and backward cost one O x R x I product each, plus the tiles of the band (arXiv 2407.15508 for the
    parametrisation; the tiling is ours).
    """
    return _BandUpdate.apply(diagonals_WR, u_OR, v_IR)  # pyright: ignore[reportReturnType]
