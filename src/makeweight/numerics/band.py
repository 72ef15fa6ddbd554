"""Products with a band matrix between two orthonormal factors, at the cost of the band.

The core of Singular-value Diagonal Expansion is dW = U B V^T with B an R x R matrix that is zero outside
|i - j| <= b. B is held by columns, (R, W) with W = 2 b + 1: `band[j, k]` is B[j + k - b, j], and entries that would
lie outside the matrix stay zero. Columns are worked on in tiles of `tile`, each of which touches `tile + 2 b`
neighbouring rows only, so that both directions are batched matrix products and neither the R x R core nor its
gradient is formed. Where a tile would reach across the whole matrix, the band is written out instead: it then is most
of the core, and one plain product is cheaper. Read as rows of B^T, columns lie one element further in every row, so
laying a band out and reading it back are strided copies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def band_to_dense(band_RW: Tensor) -> Tensor:
    """Write the band out as an R x R matrix."""
    rank, width = band_RW.shape
    return _lay_out(band_RW.unsqueeze(0))[0, :, width // 2 : width // 2 + rank].T


def dense_to_band(dense_RR: Tensor, band: int) -> Tensor:
    """Read the (R, W) band of an R x R matrix, zero where it leaves it."""
    return _read_off(F.pad(dense_RR.T, (band, band)).unsqueeze(0), band)[0]


def _lay_out(band_NRW: Tensor) -> Tensor:
    """Write every band into the transpose of its padded matrix, shape (N, R, R + 2 b)."""
    count, rank, width = band_NRW.shape
    padded = band_NRW.new_zeros(count, rank, rank + width - 1)
    _columns(padded, width).copy_(band_NRW)
    return padded


def _read_off(padded: Tensor, band: int) -> Tensor:
    """Undo `_lay_out`: the (N, R, W) bands of transposed padded matrices."""
    return _columns(padded.contiguous(), 2 * band + 1).contiguous()


def _columns(padded: Tensor, width: int) -> Tensor:
    """View the band inside a contiguous (N, R, R + 2 b) tensor: each row's begins one element further right."""
    count, rank, length = padded.shape
    return padded.as_strided((count, rank, width), (rank * length, length + 1, 1))


def _tile_of(band: int) -> int:
    """Choose a tile that keeps the padding (2 b of tile + 2 b rows) small and the products large."""
    return max(32, 2 * band)


def _windows(factor_MR: Tensor, band: int, tile: int) -> Tensor:
    """Cut the columns of a factor into overlapping windows, shape (tiles, M, tile + 2 b)."""
    rank = factor_MR.shape[1]
    tiles = -(-rank // tile)
    padded = F.pad(factor_MR, (band, tiles * tile - rank + band))
    return padded.unfold(1, tile + 2 * band, tile).transpose(0, 1)


def times_band(factor_MR: Tensor, band_RW: Tensor) -> Tensor:
    """Multiply (M, R) by the band matrix without forming it, shape (M, R)."""
    rank, width = band_RW.shape
    band = width // 2
    if band == 0:
        return factor_MR * band_RW.T
    tile = _tile_of(band)
    if tile + 2 * band >= rank:
        return factor_MR @ band_to_dense(band_RW)
    columns = F.pad(band_RW, (0, 0, 0, -rank % tile)).view(-1, tile, width)
    product = torch.bmm(_windows(factor_MR, band, tile), _lay_out(columns).transpose(1, 2))
    return product.transpose(0, 1).flatten(1)[:, :rank]


def band_of_product(left_MR: Tensor, right_MR: Tensor, band: int) -> Tensor:
    """Return the band of left^T @ right without forming the rest, as (R, W)."""
    rank = left_MR.shape[1]
    if band == 0:
        return (left_MR * right_MR).sum(0).unsqueeze(1)
    tile = _tile_of(band)
    if tile + 2 * band >= rank:
        return dense_to_band(left_MR.T @ right_MR, band)
    right = F.pad(right_MR, (0, -rank % tile)).unflatten(1, (-1, tile)).permute(1, 2, 0)
    return _read_off(torch.bmm(right, _windows(left_MR, band, tile)), band).flatten(0, 1)[:rank]


class _BandUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, band_RW: Tensor, u_OR: Tensor, v_IR: Tensor) -> Tensor:
        ctx.save_for_backward(u_OR, v_IR)
        ctx.band, ctx.dtype = band_RW.shape[1] // 2, band_RW.dtype
        if u_OR.shape[0] > v_IR.shape[0]:
            return u_OR @ times_band(v_IR, band_RW.to(v_IR.dtype)).T
        return times_band(u_OR, band_RW.to(u_OR.dtype)) @ v_IR.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u_OR, v_IR = ctx.saved_tensors
        grad_OI = grads[0].to(u_OR.dtype)
        if u_OR.shape[0] > v_IR.shape[0]:
            return band_of_product(v_IR, (u_OR.T @ grad_OI).T, ctx.band).to(ctx.dtype), None, None
        return band_of_product(u_OR, grad_OI @ v_IR, ctx.band).to(ctx.dtype), None, None


def band_update(band_RW: Tensor, u_OR: Tensor, v_IR: Tensor) -> Tensor:
    """Return dW = U B V^T, or U B^T V^T where O > I, shape (O, I) in the factors' dtype.

    The band meets the shorter factor, whichever that is, and the gradient reaches the band only. Forward and backward
    cost one O x R x I product each, plus the tiles of the band (arXiv 2407.15508 for the parametrisation; the tiling
    is ours).
    """
    return _BandUpdate.apply(band_RW, u_OR, v_IR)  # pyright: ignore[reportReturnType]
