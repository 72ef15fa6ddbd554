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
    scaled_OGS: Tensor,
    centred_OGS: Tensor,
    inside_OGS: Tensor,
    scale_OG: Tensor,
    offset_OGS: Tensor | None,
    flips: Flips,
) -> tuple[Tensor, Tensor]:
    """Turn the slope along rounded weights into that along scales (O, G) and along weights by flips (O, G, S).

    `scaled_OGS` is w / scale, `centred_OGS` the code less the zero-point, `inside_OGS` 1 where the code was not
    clipped and else 0. The slope along an offset, in steps, is that along its weight times the scale. Overwrites
    `grad_OGS`.
    """
    column_O1, row_I = flips.curvature
    groups, size = grad_OGS.shape[1:]
    taken = flips.own + flips.damp
    damp = flips.damp / taken if taken else 0.0
    error_OGS = centred_OGS - scaled_OGS  # what rounding adds, in steps, offset included
    bend_OGS = (column_O1 * scale_OG).mul_(taken).unsqueeze(-1) * row_I.view(1, groups, size)
    flip_OGS = error_OGS * (damp - 1) if offset_OGS is None else torch.add(offset_OGS, error_OGS, alpha=damp - 1)
    flip_OGS.mul_(bend_OGS).add_(grad_OGS).mul_(inside_OGS)
    if damp:
        grad_OGS.addcmul_(error_OGS, bend_OGS, value=damp)
    # A scale stretches the code; what it moves w / scale by counts as a flip.
    return grad_OGS.mul_(centred_OGS).addcmul_(scaled_OGS, flip_OGS, value=-1).sum(-1), flip_OGS
