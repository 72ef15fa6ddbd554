"""Gradients of rounding that know what a flip costs.

Weights, offsets and scales change a rounded weight by flips of its code. Straight-through takes the loss's slope at the
rounded weight for that of a flip. But the weight's own share of that slope, h (w_hat - w) with h the curvature of the
loss along it, pulls it to the very point where its code flips, and there a flip gains nothing: h times the square of
half a step before and after. Measured at the weight as it is before rounding, that share is zero. So h times what
rounding adds is taken out of whatever acts by flips; a scale's other way, stretching codes that stay, keeps the slope.
With one weight, or weights that do not touch each other, this is the exact derivative of the loss.

Damping adds damp / 2 times the sum of h (w_hat - w)^2 to the loss: what calibration has not seen speaks for the
weights as they were, or where learned maps below have moved them, which are taken as given here.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    offset_OGS: Tensor | None,
    slope_OGS: Tensor,
    inside_OGS: Tensor,
    flips: Flips,
) -> tuple[Tensor, Tensor]:
    """Turn the slope along rounded weights into that along scales (O, G) and along weights by flips (O, G, S).

    `slope_OGS` and `inside_OGS` are what `scale_slope` gives: within the range, what rounding adds to w / scale, offset
    included. The slope along an offset, in steps, is that along its weight times the scale.
    """
    column_O1, row_I = flips.curvature
    groups, size = weight_OGS.shape[1:]
    bend_OGS = column_O1.unsqueeze(-1) * row_I.view(1, groups, size)
    scale_OG1 = scale_OG.unsqueeze(-1)
    own_OGS = -slope_OGS if offset_OGS is None else offset_OGS - slope_OGS
    own_OGS.mul_(inside_OGS).mul_(bend_OGS).mul_(flips.own + flips.damp)
    if flips.damp:
        error_OGS = (slope_OGS * scale_OG1).addcmul_(inside_OGS - 1, weight_OGS)
        grad_OGS = torch.addcmul(grad_OGS, error_OGS, bend_OGS, value=flips.damp)
    grad_scale_OG = (slope_OGS * grad_OGS).addcmul_(own_OGS, weight_OGS, value=-1).sum(-1)
    return grad_scale_OG, (grad_OGS * inside_OGS).addcmul_(own_OGS, scale_OG1)
