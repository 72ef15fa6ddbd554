"""The grid whose scales and zero-points are given, or learned, and do not follow the weights.

Shapes: O out, I in, G groups per row, S inputs per group (I = G * S).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from makeweight.numerics.grid import from_codes, grouped, held_scales, scale_slope, to_codes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.slabs import Rows, by_rows


def stored(scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round scales to values above zero that `scale_dtype` holds, and zero-points to codes; dtypes stay.

    What `qparams` gives is left as it is.
    """
    narrow = torch.finfo(torch.float16 if scale_dtype == torch.bfloat16 else scale_dtype)
    held_OG = held_scales(scale_OG.clamp(min=narrow.smallest_normal * narrow.eps), scale_dtype)
    return held_OG, zero_OG.clamp(scheme.qmin, scheme.qmax).round()


class _SteppedGrid(torch.autograd.Function):
    """Fake quantization with its gradient in closed form; codes and masks are recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_OI: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        def work(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Rows:
            codes_OGS = to_codes(_view(weight_OI, scale_OG), scale_OG, zero_OG, scheme)
            codes_OGS.sub_(zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1))
            return (codes_OGS.flatten(1).to(dtype),)

        scale_OG, zero_OG = stored(scale_OG, zero_OG, scheme, scale_dtype)
        ctx.save_for_backward(weight_OI, scale_OG, zero_OG)
        ctx.scheme = scheme
        return by_rows(work, weight_OI, scale_OG, zero_OG)[0]  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def work(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grad_OI: Tensor) -> Rows:
            grad_OGS = _view(grad_OI.to(weight_OI.dtype), scale_OG)
            slope_OGS, inside_OGS = scale_slope(_view(weight_OI, scale_OG), scale_OG, zero_OG, ctx.scheme)
            grad_weight = grad_scale = grad_zero = None
            if ctx.needs_input_grad[1]:
                grad_scale = slope_OGS.mul_(grad_OGS).sum(-1)
            if ctx.needs_input_grad[2]:
                # Summed over what is clipped alone: AdamW would follow the noise of a difference of sums.
                outside_OGS = torch.sub(1, inside_OGS, out=slope_OGS)
                grad_zero = outside_OGS.mul_(grad_OGS).sum(-1).mul_(scale_OG).neg_()
            if ctx.needs_input_grad[0]:
                grad_weight = inside_OGS.mul_(grad_OGS).flatten(1)
            return grad_weight, grad_scale, grad_zero

        return *by_rows(work, *ctx.saved_tensors, grads[0]), None, None, None


class _MovedCodes(torch.autograd.Function):
    """Codes that move and scales that stretch them, with the gradient in closed form; nothing but codes is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        offset_OI: Tensor | None,
        scale_OG: Tensor,
        codes_OI: Tensor,
        zero_OG: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
    ) -> Tensor:
        def work(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Rows:
            return (from_codes(_view(codes_OI.to(scale_OG.dtype), scale_OG), scale_OG, zero_OG).flatten(1).to(dtype),)

        if offset_OI is not None:
            codes_OI = moved_codes(codes_OI, offset_OI, scheme)
        ctx.save_for_backward(codes_OI, scale_OG, zero_OG)
        return by_rows(work, codes_OI, scale_OG, zero_OG)[0]  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def work(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grad_OI: Tensor) -> Rows:
            grad_OGS = _view(grad_OI.to(scale_OG.dtype), scale_OG)
            centred_OGS = _view(codes_OI.to(scale_OG.dtype), scale_OG).sub_(zero_OG.unsqueeze(-1))
            grad_scale = centred_OGS.mul_(grad_OGS).sum(-1)
            grad_offset = (grad_OGS * scale_OG.unsqueeze(-1)).flatten(1) if ctx.needs_input_grad[0] else None
            return grad_offset, grad_scale

        return *by_rows(work, *ctx.saved_tensors, grads[0]), None, None, None, None


def moved_codes(codes_OI: Tensor, offset_OI: Tensor, scheme: Scheme) -> Tensor:
    """Return the codes nearest to codes plus learned offsets, int8."""
    return (codes_OI + offset_OI).round_().clamp_(scheme.qmin, scheme.qmax).to(torch.int8)


def moving_grid(
    codes_OI: Tensor, offset_OI: Tensor | None, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """Return the matrix that codes stand for, (O, I) in `dtype`, differentiable in their scales and offsets.

    Rounding is straight-through: an offset, in codes, gets the scale, and a scale the code's distance from zero.
    Offsets that stay within the range of the codes are never clipped; None leaves the codes where they are.
    """
    return _MovedCodes.apply(offset_OI, scale_OG, codes_OI, zero_OG, scheme, dtype)  # pyright: ignore[reportReturnType]


def _view(weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    return grouped(weight_OI, weight_OI.shape[1] // scale_OG.shape[1])


def stepped_grid(
    weight_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Fake-quantize a matrix with scales and zero-points in steps, both floats, shape (O, I) in `dtype`.

    Both are rounded as `stored` does. All rounding is straight-through: inside the range the scale gets the rounding
    residual (code - zero) - w / scale, the weight one and the zero-point nothing; outside the scale gets the end
    (code - zero), the weight nothing and the zero-point -scale (LSQ, arXiv 1902.08153, section 2.1; with a learned
    zero-point EfficientQAT, arXiv 2407.11062, section 3.2).
    """
    return _SteppedGrid.apply(  # pyright: ignore[reportReturnType]
        weight_OI, scale_OG, zero_OG, scheme, scale_dtype, dtype
    )
