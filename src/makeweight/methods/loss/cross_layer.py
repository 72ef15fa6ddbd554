"""Where a block's error is judged: after the block itself (mse), or some blocks later as well (cross-layer, CL).

CL lets errors of one block be compensated by what the following, still full-precision blocks make of them. Each
judged place contributes its own relative error, so no block outweighs another because its activations are larger.

Over other methods: CL is a loss and nothing else, so whatever learns by a block's loss can be judged by it, and what
learns nothing (rtn, awq, gptq alone) has nothing to be judged and is refused. GPTQ that follows learning rounds linear
by linear for each one's own outputs and cannot see ahead: it may spoil what CL had traded between blocks. So which
codes stay, its own or the nearest, is decided by CL's loss on held-out samples (sweep/run.py). e2e has the loss of the
whole network and comes after.
Source: arXiv 2407.15508 (the idea, two layers ahead); decay, normalisation and defaults are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from makeweight.errors import UserError
from makeweight.methods.base import LossStep

MOST = 100


@dataclass(frozen=True, kw_only=True)
class Mse(LossStep):
    """Judge the block by its own output."""

    def weights(self) -> tuple[float, ...]:  # noqa: D102
        return (1.0,)


@dataclass(frozen=True, kw_only=True)
class CrossLayer(LossStep):
    """Judge the block by its own output and by the outputs of the `ahead` blocks that follow.

    The k-th block ahead weighs `decay`**k. LOG.md has the sweep behind the defaults.
    """

    ahead: int = 1
    decay: float = 0.3

    def __post_init__(self) -> None:
        if not (1 <= self.ahead <= MOST and 0 < self.decay <= MOST):
            said = f"ahead {self.ahead} must be at least 1 and decay {self.decay} above 0"
            raise UserError(f"{said}, and neither of them above {MOST}.")

    def weights(self) -> tuple[float, ...]:  # noqa: D102
        return tuple(self.decay**k for k in range(self.ahead + 1))
