"""The uniform integer grid: ranges to scales, weights to codes, and rounding that gradients pass through.

Shapes: O out, I in, G groups per row, S inputs per group (I = G * S). Codes and zero-points are signed, in
[-2**(b-1), 2**(b-1) - 1], the convention of compressed-tensors, whose rounding this equals bit for bit (but
for bfloat16 scales below FINEST).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from makeweight.numerics.flips import Flips, flip_slopes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.slabs import by_rows

FINEST = 2.0**-17
"""Below this bfloat16 has finer steps than float16, in which other formats keep scales."""


def grouped(weight_OI: Tensor, group: int) -> Tensor:
    """View a matrix as groups of inputs that share a scale, shape (O, G, S)."""
    return weight_OI.unflatten(1, (-1, group))


def ranges(weight_OGS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest weight of every group with zero inside, each (O, G)."""
    # Two passes: aminmax is one, but ten times slower on a CPU.
    return weight_OGS.amin(-1).clamp_(max=0), weight_OGS.amax(-1).clamp_(min=0)


def scale_dtype_of(scheme: Scheme, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of scales in a model whose weights are stored as `stored`."""
    automatic = torch.float16 if stored == torch.float32 else stored
    return automatic if scheme.scale_dtype == "auto" else getattr(torch, scheme.scale_dtype)


def qparams(low_OG: Tensor, high_OG: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn ranges with low <= 0 <= high into scales and integer zero-points, both (O, G) in the ranges' dtype.

    Scales are rounded by `held_scales`.
    A group of zeros, or one whose scale is too small for `scale_dtype`, gets that dtype's epsilon as its scale.
    """
    steps = scheme.qmax - scheme.qmin
    if scheme.symmetric:
        raw_OG = torch.maximum(-low_OG, high_OG) / (steps / 2)
        zero_OG = torch.zeros_like(raw_OG)
    else:
        raw_OG = (high_OG - low_OG) / steps
        zero_OG = (scheme.qmin - low_OG / raw_OG).nan_to_num(nan=0.0).clamp(scheme.qmin, scheme.qmax).round()
    scale_OG = held_scales(raw_OG, scale_dtype)
    return torch.where(scale_OG == 0, torch.finfo(scale_dtype).eps, scale_OG), zero_OG


def held_scales(scale_OG: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round scales to values that `scale_dtype` holds, and float16 as well where that is coarser; the dtype stays."""
    held_OG = scale_OG.clamp(max=torch.finfo(scale_dtype).max).to(scale_dtype).to(scale_OG.dtype)
    if scale_dtype != torch.bfloat16:
        return held_OG
    return torch.where(held_OG < FINEST, held_OG.half().to(held_OG.dtype), held_OG)


def to_codes(
    weight_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, offset_OGS: Tensor | None = None
) -> Tensor:
    """Round weights, moved by an offset in steps where there is one, to signed codes in the weights' float dtype."""
    codes_OGS = (weight_OGS / scale_OG.unsqueeze(-1)).add_(zero_OG.unsqueeze(-1))
    if offset_OGS is not None:
        codes_OGS.add_(offset_OGS)
    return codes_OGS.round_().clamp_(scheme.qmin, scheme.qmax)


def from_codes(codes_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """Return the weights that codes stand for: (code - zero) * scale, shape (O, G, S)."""
    return (codes_OGS - zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1))


def round_tokens(hidden: Tensor, bits: int) -> Tensor:
    """Round what enters a linear to `bits` bits, symmetric, one scale per token (the last dimension), same dtype.

    Gradients are those of `clipped_grid`: straight through, and a token's scale follows its largest value.
    """
    scheme = Scheme(bits=bits, group_size=-1, symmetric=True)
    rows_MI = hidden.float().reshape(-1, hidden.shape[-1])
    whole_M1 = rows_MI.new_ones(len(rows_MI), 1)
    rounded_MI = clipped_grid(rows_MI, whole_M1, whole_M1, scheme, scale_dtype=torch.float32, dtype=hidden.dtype)
    return rounded_MI.reshape(hidden.shape)


@dataclass(frozen=True, kw_only=True)
class _Clipping:
    """Fake quantization with learned clipping of some rows, and its gradient in closed form."""

    scheme: Scheme
    group: int
    scale_dtype: torch.dtype
    dtype: torch.dtype
    flips: Flips | None

    def rounded(
        self, weight_OI: Tensor, low_factor_OG: Tensor, high_factor_OG: Tensor, offset_OI: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return rounded weights, (O, I) in `dtype`, and low, high, scale and zero of their groups."""
        weight_OGS = grouped(weight_OI, self.group)
        low_OG, high_OG = ranges(weight_OGS)
        ends = (low_OG * low_factor_OG, high_OG * high_factor_OG)
        scale_OG, zero_OG = qparams(*ends, self.scheme, self.scale_dtype)
        codes_OGS = to_codes(weight_OGS, scale_OG, zero_OG, self.scheme, _like(offset_OI, weight_OGS))
        codes_OGS.sub_(zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1))
        return codes_OGS.flatten(1).to(self.dtype), low_OG, high_OG, scale_OG, zero_OG

    def slopes(
        self,
        weight_OI: Tensor,
        grad_OI: Tensor,
        low_factor_OG: Tensor,
        high_factor_OG: Tensor,
        offset_OI: Tensor | None,
        low_OG: Tensor,
        high_OG: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor,
        column_O1: Tensor | None,
        *,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the slopes along what `rounded` takes; `column_O1` is these rows' part of the curvature."""
        weight_OGS = grouped(weight_OI, self.group)
        grad_OGS = grouped(grad_OI.to(weight_OI.dtype, copy=True), self.group)
        offset_OGS = _like(offset_OI, weight_OGS)
        rounded = _rounding(weight_OGS, scale_OG, zero_OG, self.scheme, offset_OGS)
        if self.flips is not None and column_O1 is not None:
            flips = self.flips._replace(curvature=(column_O1, self.flips.curvature[1]))
            grad_scale_OG, grad_OGS = flip_slopes(grad_OGS, *rounded, scale_OG, offset_OGS, flips)
        else:
            slope_OGS, inside_OGS = _scale_slope(*rounded)
            grad_scale_OG = slope_OGS.mul_(grad_OGS).sum(-1)
            if wanted[0] or wanted[3]:
                grad_OGS.mul_(inside_OGS)
        ends = (low_OG * low_factor_OG, high_OG * high_factor_OG)
        grad_low_OG, grad_high_OG = (slope_OG * grad_scale_OG for slope_OG in _range_slopes(*ends, self.scheme))
        grad_weight = grad_offset = None
        if wanted[3]:
            grad_offset = (grad_OGS * scale_OG.unsqueeze(-1)).flatten(1)
        if wanted[0]:
            # The ends of a range move with the weights that set them.
            _pull(grad_OGS, weight_OGS, low_OG, grad_low_OG * low_factor_OG)
            _pull(grad_OGS, weight_OGS, high_OG, grad_high_OG * high_factor_OG)
            grad_weight = grad_OGS.flatten(1)
        return grad_weight, grad_low_OG * low_OG, grad_high_OG * high_OG, grad_offset


class _ClippedGrid(torch.autograd.Function):
    """Few passes over the weight, in cache, and nothing big kept: codes are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_OI: Tensor,
        low_factor_OG: Tensor,
        high_factor_OG: Tensor,
        offset_OI: Tensor | None,
        clipping: _Clipping,
    ) -> Tensor:
        out_OI, *found = by_rows(clipping.rounded, weight_OI, low_factor_OG, high_factor_OG, offset_OI)
        ctx.save_for_backward(weight_OI, low_factor_OG, high_factor_OG, offset_OI, *found)
        ctx.clipping = clipping
        assert out_OI is not None
        return out_OI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, *others = ctx.saved_tensors
        clipping: _Clipping = ctx.clipping
        column_O1 = None if clipping.flips is None else clipping.flips.curvature[0]
        work = partial(clipping.slopes, wanted=ctx.needs_input_grad)
        return *by_rows(work, weight_OI, grads[0], *others, column_O1), None


def _pull(grad_OGS: Tensor, weight_OGS: Tensor, end_OG: Tensor, pull_OG: Tensor) -> None:
    """Share a pull among the weights that set an end of their range: those that are equal to it."""
    sets_OGS = torch.eq(weight_OGS, end_OG.unsqueeze(-1), out=torch.empty_like(weight_OGS))
    share_OG = pull_OG / sets_OGS.sum(-1).clamp_(min=1)
    grad_OGS.addcmul_(sets_OGS, share_OG.unsqueeze(-1))


def _like(offset_OI: Tensor | None, weight_OGS: Tensor) -> Tensor | None:
    return None if offset_OI is None else offset_OI.view_as(weight_OGS)


def scale_slope(weight_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return d w_hat / d scale (the rounding residual inside the range, its end outside) and 1 inside, 0 outside."""
    return _scale_slope(*_rounding(weight_OGS, scale_OG, zero_OG, scheme, None))


def _rounding(
    weight_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, offset_OGS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w / scale, the code less the zero-point, and 1 where the code was not clipped and else 0.

    Masks are floats, written as such: passes over booleans are several times slower on a CPU.
    """
    scaled_OGS = weight_OGS / scale_OG.unsqueeze(-1)
    rounded_OGS = torch.add(scaled_OGS, zero_OG.unsqueeze(-1))
    if offset_OGS is not None:
        rounded_OGS.add_(offset_OGS)
    codes_OGS = rounded_OGS.round_().clamp(scheme.qmin, scheme.qmax)
    inside_OGS = rounded_OGS.eq_(codes_OGS)
    return scaled_OGS, codes_OGS.sub_(zero_OG.unsqueeze(-1)), inside_OGS


def _scale_slope(scaled_OGS: Tensor, centred_OGS: Tensor, inside_OGS: Tensor) -> tuple[Tensor, Tensor]:
    return centred_OGS.addcmul_(scaled_OGS, inside_OGS, value=-1), inside_OGS


def _range_slopes(low_OG: Tensor, high_OG: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return d scale / d low and d scale / d high."""
    steps = scheme.qmax - scheme.qmin
    if not scheme.symmetric:
        return torch.full_like(low_OG, -1 / steps), torch.full_like(high_OG, 1 / steps)
    low_rules = (-low_OG > high_OG).to(low_OG.dtype)
    return -2 / steps * low_rules, 2 / steps * (1 - low_rules)


def clipped_grid(
    weight_OI: Tensor,
    low_factor_OG: Tensor,
    high_factor_OG: Tensor,
    scheme: Scheme,
    *,
    offset_OI: Tensor | None = None,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    flips: Flips | None = None,
) -> Tensor:
    """Fake-quantize a matrix whose group ranges are shrunk by learned factors, shape (O, I) in `dtype`.

    `offset_OI` is added before rounding, in steps: within half a step it chooses between the two nearest codes.
    Rounding is straight-through, clipped weights get no gradient, the zero-point none; ranges follow the weight
    (OmniQuant, arXiv 2308.13137, section 3.2). The ends of the range that the zero-point is rounded from are
    treated as fixed, as OmniQuant does.

    With `flips` the gradients are those of `flip_slopes`.
    """
    clipping = _Clipping(
        scheme=scheme,
        group=weight_OI.shape[1] // low_factor_OG.shape[1],
        scale_dtype=scale_dtype,
        dtype=dtype,
        flips=flips,
    )
    return _ClippedGrid.apply(  # pyright: ignore[reportReturnType]
        weight_OI, low_factor_OG, high_factor_OG, offset_OI, clipping
    )
