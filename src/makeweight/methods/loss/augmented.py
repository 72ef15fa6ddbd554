"""A block is also held to what the original block makes of the same, already quantized input.

The original's own output asks a block to undo the errors of all blocks before it, which at 2 bits are large and which
a few codes cannot undo; this target asks only for what the block itself can give. The loss is the weighted mean of
both. At the first block both targets are one.
Source: arXiv 2308.13137 (OmniQuant) with its code's `aug_loss`, which every of its 2-bit recipes for LLaMA uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from makeweight.errors import UserError
from makeweight.methods.base import TargetStep


@dataclass(frozen=True, kw_only=True)
class Augmented(TargetStep):
    """Add the target of the same input, as heavy as the block's own where `weight` is 1."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"weight {self.weight} must be above 0.")
