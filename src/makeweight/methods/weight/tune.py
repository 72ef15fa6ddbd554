"""Weights themselves as learnables (Block-AP): every entry of a matrix moves.

With a learned grid above it this is the block-wise stage of EfficientQAT. Like SDE it leaves nothing behind: what
counts is where the weight lies when it is rounded.
Source: arXiv 2407.11062 (EfficientQAT, Block-AP). The relative learning rate is ours.

Shapes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from makeweight.methods.base import Context, Learnables, Map, MapStep, Stage, State


class TunedWeights(Map):
    """W -> W + dW, with dW of any shape."""

    def __init__(self, state: State, step: Tune) -> None:
        super().__init__()
        self.step, self.names = step, {name: name.replace(".", "-") for name in state}
        self.changes = nn.ParameterDict({self.names[name]: torch.zeros_like(weight) for name, weight in state.items()})
        # One rate for a block, as AdamW steps every entry alike: the typical size of its weights.
        sizes = torch.stack([weight.square().mean() for weight in state.values()])
        self.unit = float(sizes.mean().sqrt())

    def forward(self, state: State) -> State:  # noqa: D102
        return {name: weight + self.changes[self.names[name]] for name, weight in state.items()}

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        yield Learnables("tune.rate", tuple(self.changes.values()), self.step.rate, self.unit)


@dataclass(frozen=True, kw_only=True)
class Tune(MapStep):
    """Learn the weights; `rate` is how far one AdamW step moves an entry, relative to the weights' typical size."""

    stage: ClassVar[Stage] = Stage.WEIGHT
    rate: float = 1e-3

    @property
    def weight_bytes(self) -> int:  # noqa: D102
        return 5 * 4

    def build(self, state: State, context: Context) -> Map:  # noqa: D102
        return TunedWeights(state, self)
