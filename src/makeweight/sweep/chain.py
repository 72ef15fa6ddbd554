"""The maps of one block in order of execution: its weights in, what the grid can hold out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from makeweight.methods.base import Context, Grid, GridStep, Learnables, Map, MapStep, State
from makeweight.numerics.qtensor import QTensor


class Chain(nn.Module):
    """Fold maps over the weights of a block, then bring them to the grid."""

    def __init__(self, state: State, maps: Sequence[Map], grid: Grid) -> None:
        super().__init__()
        self.base = state
        self.maps, self.grid = nn.ModuleList(maps), grid

    @classmethod
    def build(cls, state: State, steps: Sequence[MapStep], grid: GridStep, context: Context) -> Chain:
        """Build every map on the weights that reach it, at the identity; `state` holds the block's own, fp32."""
        maps, reached = [], state
        for step in steps:
            maps.append(step.build(reached, context))
            with torch.no_grad():
                reached = maps[-1](reached)
        return cls(state, maps, grid.build(reached, context))

    def moved(self) -> State:
        """Return the weights as the grid receives them, fp32."""
        state = self.base
        for step in self.maps:
            state = step(state)
        return state

    def forward(self) -> dict[str, Tensor]:
        """Return the quantized weights in the forward's dtype, differentiable in all that is learned."""
        return self.grid(self.moved())

    @property
    def quantizer(self) -> Grid:
        """The last map."""
        assert isinstance(self.grid, Grid)
        return self.grid

    def learnables(self) -> Iterator[Learnables]:
        """Yield the learnables of every map, those of the grid last."""
        for part in self._parts():
            yield from part.learnables()

    def constrain(self) -> None:
        """Pull all learnables back into their allowed sets."""
        for part in self._parts():
            part.constrain()

    def report(self) -> Mapping[str, float]:
        """Collect what the maps report."""
        return {key: value for part in self._parts() for key, value in part.report().items()}

    @torch.no_grad()
    def freeze(self) -> tuple[dict[str, Tensor], dict[str, QTensor]]:
        """Return the final weights and their codes; the codes dequantize to exactly these weights.

        Raises RuntimeError where they do not: the committed block would not be the one that was trained.
        """
        state = self.moved()
        weights, codes = self.grid(state), self.grid.codes(state)
        for name, weight in weights.items():
            if not torch.equal(codes[name].dequantize(weight.dtype), weight):
                raise RuntimeError(f"the codes of {name} do not stand for the weights it was trained with")
        return weights, codes

    def _parts(self) -> Iterator[Map]:
        for part in (*self.maps, self.grid):
            assert isinstance(part, Map)
            yield part
