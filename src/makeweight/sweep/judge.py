"""What learning of a block is judged by: errors after the block itself and after those that follow.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from makeweight.numerics.errors import token_error
from makeweight.sweep.block import Block


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The blocks a loss looks at and what each weighs: the block itself first, then those that follow.

    Where `same_input` is not 0, the first block's output has one more target, after all others.
    """

    blocks: tuple[Block, ...]
    weights: tuple[float, ...]
    device: torch.device
    same_input: float = 0.0

    @property
    def shares(self) -> tuple[float, ...]:
        """What each error weighs in the loss; their sum is 1."""
        weights = (*self.weights, self.same_input) if self.same_input else self.weights
        return tuple(weight / sum(weights) for weight in weights)

    def outputs(self, chain_weights: Mapping[str, Tensor], hidden_BTD: Tensor) -> list[Tensor]:
        """Return what is judged: what each block gives, and the first one's once more for the same input's target."""
        outputs = [self.blocks[0](hidden_BTD, chain_weights)]
        for block in self.blocks[1:]:
            outputs.append(block(outputs[-1]))
        return [*outputs, outputs[0]] if self.same_input else outputs

    def errors(
        self, chain_weights: Mapping[str, Tensor], hidden_BTD: Tensor, targets: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the relative error after each judged block, and of the same input's, scalars in fp32."""
        pairs = zip(self.outputs(chain_weights, hidden_BTD), targets, strict=True)
        return [token_error(output_BTD, target_BTD.to(self.device)) for output_BTD, target_BTD in pairs]

    def loss(self, errors: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of the errors."""
        return torch.stack([share * error for share, error in zip(self.shares, errors, strict=True)]).sum()
