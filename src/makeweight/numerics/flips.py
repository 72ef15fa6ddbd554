"""Gradients of rounding that know what a flip costs.

Weights, offsets and scales change a rounded weight by flips of its code. Straight-through takes the loss's slope at the
rounded weight for that of a flip. But the weight's own share of that slope, h (w_hat - w) with h the curvature of the
loss along it, pulls it to the very point where its code flips, and there a flip gains nothing: h times the square of
half a step before and after. Measured at the weight as it is before rounding, that share is zero. So h times what
rounding adds is taken out of whatever acts by flips; a scale's other way, stretching codes that stay, keeps the slope.
With one weight, or weights that do not touch each other, this is the exact derivative of the loss.

Damping adds damp / 2 times the sum of h (w_hat - w)^2 to the loss: what calibration has not seen speaks for the
weights as they were.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from makeweight.numerics.scheme import Scheme

Curvature = tuple[Tensor, Tensor]
"""How a loss bends along the entries of a matrix: second derivatives, as a column (O, 1) times a row (I,), fp32."""


class Flips(NamedTuple):
    """The curvature of a matrix, the share of a weight's own pull that is taken out, and the damping."""

    curvature: Curvature
    own: float = 1.0
    damp: float = 0.0


def flip_slopes(
    grad_OGS: Tensor,
    weight_OGS: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    scheme: Scheme,
    offset_OGS: Tensor | None,
    flips: Flips,
) -> tuple[Tensor, Tensor]:
    """Turn the slope along rounded weights into that along scales (O, G) and along weights by flips (O, G, S).

    The slope along an offset, in steps, is that along its weight times the scale. Beyond the range there are no flips.
    """
    column_O1, row_I = flips.curvature
    groups, size = weight_OGS.shape[1:]
    bend_OGS = column_O1.unsqueeze(-1) * row_I.view(1, groups, size)
    scale_OG1 = scale_OG.unsqueeze(-1)
    scaled_OGS = weight_OGS / scale_OG1
    unrounded_OGS = scaled_OGS + zero_OG.unsqueeze(-1)
    if offset_OGS is not None:
        unrounded_OGS += offset_OGS
    rounded_OGS = unrounded_OGS.round()
    codes_OGS = rounded_OGS.clamp(scheme.qmin, scheme.qmax)
    # Masks are floats, as passes over booleans are several times slower on a CPU; rounded minus codes is an integer.
    inside_OGS = (rounded_OGS - codes_OGS).abs_().clamp_(max=1).neg_().add_(1)
    own_OGS = unrounded_OGS.sub_(rounded_OGS).mul_(inside_OGS).mul_(bend_OGS).mul_(flips.own + flips.damp)
    steps_OGS = codes_OGS.sub_(zero_OG.unsqueeze(-1))
    if flips.damp:
        error_OGS = torch.sub(steps_OGS, scaled_OGS, out=rounded_OGS).mul_(scale_OG1)
        grad_OGS = torch.addcmul(grad_OGS, error_OGS, bend_OGS, value=flips.damp)
    slope_OGS = steps_OGS.addcmul_(scaled_OGS, inside_OGS, value=-1)
    grad_scale_OG = slope_OGS.mul_(grad_OGS).addcmul_(own_OGS, weight_OGS, value=-1).sum(-1)
    return grad_scale_OG, (grad_OGS * inside_OGS).addcmul_(own_OGS, scale_OG1)
