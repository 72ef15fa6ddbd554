"""Where a block's error is judged: after the block itself (mse), or some blocks later as well (cross-layer, CL).

CL lets errors of one block be compensated by what the following, still full-precision blocks make of them. Each
judged place contributes its own relative error, so no block outweighs another because its activations are larger.
Source: arXiv 2407.15508 (the idea, two layers ahead); decay, normalisation and defaults are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from makeweight.errors import UserError
from makeweight.methods.base import LossStep


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
        if self.ahead < 1 or self.decay <= 0:
            raise UserError(f"ahead {self.ahead} must be at least 1 and decay {self.decay} above 0.")

    def weights(self) -> tuple[float, ...]:  # noqa: D102
        return tuple(self.decay**k for k in range(self.ahead + 1))
