"""Element-wise work on a matrix, a few rows at a time: what passes between its steps stays in a core's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLAB = 1 << 17
"""Elements of a slab for each thread: half a megabyte in float32, of which a few fit a core's second-level cache."""

Rows = tuple[Tensor | None, ...]


def by_rows(work: Callable[..., Rows], *tensors: Tensor | None) -> Rows:
    """Return what `work` makes of the tensors, whose first dimension it treats row by row, slab after slab.

    The first tensor is the largest and says how many rows a slab has; None is handed on and may be returned. On other
    devices than a CPU all rows are one slab. The result does not depend on the slabs.
    """
    first = tensors[0]
    assert first is not None
    rows = first.shape[0]
    step = max(1, SLAB * torch.get_num_threads() * rows // max(1, first.numel()))
    if step >= rows or first.device.type != "cpu":
        return work(*tensors)
    whole: Rows = ()
    for start in range(0, rows, step):
        slab = slice(start, start + step)
        parts = work(*(None if tensor is None else tensor[slab] for tensor in tensors))
        whole = whole or tuple(None if part is None else part.new_empty(rows, *part.shape[1:]) for part in parts)
        for target, part in zip(whole, parts, strict=True):
            if target is not None and part is not None:
                target[slab] = part
    return whole
