"""Rounding with error feedback: each column's error is moved into the columns that are not rounded yet.

Minimises ||(W - W_hat) X^T||^2 greedily, column by column, given H = X^T X of the inputs.
Source: GPTQ, arXiv 2210.17323, algorithm 1.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from makeweight.numerics.grid import to_codes
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.svd import LinAlgError

Ranges = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From the weights (O, S) of a group and its number to its scale and zero-point, both (O,)."""
COLUMNS = 128
"""Columns whose errors wait before they move on together."""
LARGEST_DAMP = 1.0


def feedback_factor(hessian_II: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor of the inverse of H, and the damping it took.

    Damping is a share of the mean of the diagonal; it grows tenfold until the factor exists. Raises LinAlgError where
    none up to LARGEST_DAMP does.
    """
    mean = hessian_II.diagonal().mean()
    while True:
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(mean * damp)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if not failed and bool(upper_II.isfinite().all()):
                return upper_II, damp
        if damp >= LARGEST_DAMP:
            raise LinAlgError("the inputs' products have no inverse")
        damp = min(10 * max(damp, 1e-6), LARGEST_DAMP)


def feedback_codes(
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: Scheme,
    group: int,
    ranges: Ranges,
    *,
    act_order: bool,
    damp: float,
    static_groups: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return codes (O, I), scales and zero-points (O, G), and the damping used; all in the weights' float dtype.

    With `act_order` the columns with the largest inputs come first; without, they come in order. With `static_groups`,
    and with `act_order` always, a group's range is that of its weights as they were; without, of its weights as errors
    have left them when it is reached. Inputs that are always zero get the code of zero.
    """
    weight_OI, hessian_II = weight_OI.clone(), hessian_II.clone()
    dead_I = hessian_II.diagonal() == 0
    # What the damping is a share of must not depend on them: they get the mean of the others.
    hessian_II.diagonal()[dead_I] = hessian_II.diagonal().sum() / (~dead_I).sum() if not dead_I.all() else 1.0
    weight_OI[:, dead_I] = 0
    width = weight_OI.shape[1]
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width)
    order_I = order_I.to(weight_OI.device)
    static = act_order or static_groups
    groups = [ranges(part_OS, g) for g, part_OS in enumerate(weight_OI.split(group, 1))] if static else []
    weight_OI = weight_OI[:, order_I]
    upper_II, damp = feedback_factor(hessian_II[order_I][:, order_I], damp)
    codes_OI, group_of = torch.empty_like(weight_OI), (order_I // group).tolist()
    size = _chunk(group)
    for start in range(0, width, size):
        end = min(start + size, width)
        part_OC, errors_OC = weight_OI[:, start:end].clone(), torch.zeros_like(weight_OI[:, start:end])
        for j in range(end - start):
            column = start + j
            if not static and column % group == 0:
                live_OS = part_OC[:, j : j + group] if group <= end - start else weight_OI[:, column : column + group]
                groups.append(ranges(live_OS, column // group))
            scale_O, zero_O = groups[group_of[column]]
            code_O = to_codes(part_OC[:, j, None, None], scale_O[:, None], zero_O[:, None], scheme)[:, 0, 0]
            codes_OI[:, column] = code_O
            errors_OC[:, j] = (part_OC[:, j] - (code_O - zero_O) * scale_O) / upper_II[column, column]
            part_OC[:, j + 1 :].addr_(errors_OC[:, j], upper_II[column, column + 1 : end], alpha=-1)
        weight_OI[:, end:].addmm_(errors_OC, upper_II[start:end, end:], alpha=-1)
    back_I = order_I.argsort()
    scale_OG, zero_OG = (torch.stack(parts, 1) for parts in zip(*groups, strict=True))
    return codes_OI[:, back_I], scale_OG, zero_OG, damp


def _chunk(group: int) -> int:
    """Return how many columns wait together: whole groups, or a whole part of one, so that ranges are never stale."""
    if group <= COLUMNS:
        return group * (COLUMNS // group)
    return next(size for size in range(COLUMNS, 0, -1) if group % size == 0)
