"""Which samples judge what is learned: the same in every block and for the whole network, and learned from by none.

Samples and not pieces of them: what stands elsewhere in a text that was learned from tells little of other texts. At 2
bits those that blocks had learned from had little more than half of the divergence of text that nothing saw (LOG.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE, MOST = 8, 8
"""One sample in so many judges, and no more than that: states of one run are told apart by a few thousand tokens."""


def count(samples: int) -> int:
    """Return how many samples judge."""
    return min(max(1, samples // SHARE), MOST)


def split(samples: int, seed: int, *, pieces: int = 1) -> tuple[Tensor, Tensor]:
    """Return where samples lie that judge, and those to learn from, each in `pieces`, the first pieces of all first.

    Of a single sample pieces judge, and where it has one, that is learned from as well.
    """
    if samples == 1 and pieces > 1:
        return split(pieces, seed)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    held = count(samples)
    parts = (order[:held], order[held:]) if samples > 1 else (order, order)
    judging, learned = ((torch.arange(pieces)[:, None] + part * pieces).flatten() for part in parts)
    return judging, learned
