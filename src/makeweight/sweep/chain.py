"""The maps of one block in order of execution: its weights in, what the grid can hold out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from makeweight.methods.base import (
    BlockStep,
    Context,
    Grid,
    GridStep,
    Inputs,
    Learnables,
    Map,
    MapStep,
    Params,
    State,
    Step,
)
from makeweight.numerics.precision import as_stored
from makeweight.numerics.qtensor import QTensor


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps that a chain is built from, each kind in order of execution."""

    exact: Sequence[BlockStep] = ()
    maps: Sequence[MapStep] = ()
    grid: GridStep


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a chain ends as: weights, the codes that dequantize to exactly these, other parameters fp32, a report."""

    weights: dict[str, Tensor]
    codes: dict[str, QTensor]
    rest: Params
    report: dict[str, float] = field(default_factory=dict)


def join(state: State, rest: Params) -> Params:
    """Put weights by linear name among the other parameters of their block."""
    return {**{f"{name}.weight": weight for name, weight in state.items()}, **rest}


def split(params: Params, linears: Sequence[str]) -> tuple[State, Params]:
    """Undo `join`."""
    keys = {f"{name}.weight": name for name in linears}
    state = {name: params[key] for key, name in keys.items()}
    return state, {key: value for key, value in params.items() if key not in keys}


class Chain(nn.Module):
    """Change a block as a whole, fold maps over its weights, then bring them to the grid.

    `rest` holds the other parameters where a step may change them, and is empty where none does; `stored` is the dtype
    that they end in, where it is known, so that what is judged is what is stored.
    """

    def __init__(
        self,
        state: State,
        maps: Sequence[Map],
        grid: Grid,
        *,
        rest: Params | None = None,
        exact: Sequence[Map] = (),
        stored: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base, self.rest, self.stored = state, rest or {}, stored
        self.maps, self.exact, self.grid = nn.ModuleList(maps), nn.ModuleList(exact), grid

    @classmethod
    def build(
        cls,
        state: State,
        steps: Steps,
        context: Context,
        *,
        rest: Params | None = None,
        stored: torch.dtype | None = None,
        inputs: Callable[[Params], Inputs] | None = None,
    ) -> Chain:
        """Build every map on what reaches it, at the identity; `state` and `rest` are the block's own, fp32.

        Exact steps that learn nothing are folded in before the others see the weights, and `inputs` tells what
        enters the linears with the parameters that the block has by then.
        """

        def seen(step: Step, params: Params) -> Context:
            return replace(context, inputs=inputs(params)) if inputs and step.reads_inputs else context

        linears, learned = list(state), []
        params = join(state, rest or {})
        for step in steps.exact:
            built = step.build(params, seen(step, params))
            if step.learns:
                learned.append(built)
            else:
                params = built(params)
        base, rest = split(params, linears)
        maps, reached = [], base
        for step in steps.maps:
            maps.append(step.build(reached, seen(step, params)))
            with torch.no_grad():
                reached = maps[-1](reached)
        grid = steps.grid.build(reached, seen(steps.grid, params))
        return cls(base, maps, grid, rest=rest, exact=learned, stored=stored)

    def moved(self) -> tuple[State, Params]:
        """Return the weights as the grid receives them and the other parameters, fp32."""
        state, rest = self.base, self.rest
        for part in self.maps:
            state = part(state)
        if self.exact:
            params = join(state, rest)
            for part in self.exact:
                params = part(params)
            state, rest = split(params, list(state))
        return state, rest

    def forward(self) -> dict[str, Tensor]:
        """Return what the block is run with, differentiable in all that is learned: quantized weights, and the rest."""
        state, rest = self.moved()
        weights = self.grid(state)
        dtype = next(iter(weights.values())).dtype
        if self.stored is not None:
            rest = {name: as_stored(tensor, self.stored) for name, tensor in rest.items()}
        return {**weights, **{name: tensor.to(dtype) for name, tensor in rest.items()}}

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
    def freeze(self) -> Frozen:
        """Return what the chain has learned, with codes.

        Raises RuntimeError where the codes do not stand for the weights: the block would not be the one that learned.
        """
        state, rest = self.moved()
        weights, codes = self.grid(state), self.grid.codes(state)
        for name, weight in weights.items():
            if not torch.equal(codes[name].dequantize(weight.dtype), weight):
                raise RuntimeError(f"the codes of {name} do not stand for the weights it was trained with")
        return Frozen(weights=weights, codes=codes, rest=rest)

    def _parts(self) -> Iterator[Map]:
        for part in (*self.maps, *self.exact, self.grid):
            assert isinstance(part, Map)
            yield part
