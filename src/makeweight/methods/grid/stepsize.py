"""Learned step sizes (LSQ) and zero-points: scales that follow the loss, no longer the weights.

w_hat = scale * (clip(round(w / scale) + zero) - zero). Scales and, on an asymmetric grid, zero-points begin where the
weights' range, or the part of it that costs them least, puts them, and are learned on their own; with learned weights
below (tune) this is the block-wise stage of EfficientQAT. Zero-points are rounded and stay in the code range.
Sources: arXiv 1902.08153 (LSQ); arXiv 2407.11062 (EfficientQAT, Block-AP). Learning a factor of the first scale, so
that one rate fits all models, and the start are ours.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from makeweight.methods.base import Context, Grid, GridStep, Learnables, Reads, State
from makeweight.methods.grid.clip import RangeGrid
from makeweight.methods.grid.fixed import FixedGrid
from makeweight.methods.grid.search import Start, check_start, first_ranges, read_for
from makeweight.numerics.grid import grouped, ranges

LEAST = 0.01
"""The smallest share of its first scale that a scale can shrink to."""
NEAR = 0.499
"""How far from a code a zero-point may begin and still round to it, whatever a scale lost as it was stored."""


class StepGrid(FixedGrid):
    """Scales times learned factors, and learned zero-points where the grid has any."""

    def __init__(self, state: State, context: Context, step: StepSize) -> None:
        start = first_ranges(step.start, state, context)
        with torch.no_grad():
            super().__init__({name: _begin(start, name, weight) for name, weight in state.items()}, context)
        self.step, self.names = step, {name: name.replace(".", "-") for name in state}
        self.factors, self.zeros = nn.ParameterDict(), nn.ParameterDict()
        for name, (scale_OG, zero_OG) in self.first.items():
            self.factors[self.names[name]] = nn.Parameter(torch.ones_like(scale_OG))
            if not context.scheme.symmetric:
                self.zeros[self.names[name]] = nn.Parameter(zero_OG.clone())

    def steps(self, name: str) -> tuple[Tensor, Tensor]:  # noqa: D102
        scale_OG, zero_OG = self.first[name]
        key = self.names[name]
        return scale_OG * self.factors[key], self.zeros.get(key, zero_OG)

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        yield Learnables("stepsize.rate", tuple(self.factors.values()), self.step.rate)
        if self.zeros:
            yield Learnables("stepsize.zero_rate", tuple(self.zeros.values()), self.step.zero_rate)

    def constrain(self) -> None:  # noqa: D102
        for factor_OG in self.factors.values():
            factor_OG.clamp_(min=LEAST)
        for zero_OG in self.zeros.values():
            zero_OG.clamp_(self.context.scheme.qmin, self.context.scheme.qmax)


def _begin(grid: RangeGrid, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of a range grid and its zero-points as they are before rounding to the same codes, (O, G)."""
    scheme, (scale_OG, zero_OG) = grid.context.scheme, grid.qparams(name, weight_OI)
    if scheme.symmetric:
        return scale_OG, zero_OG
    low_OG, _ = ranges(grouped(weight_OI, weight_OI.shape[1] // scale_OG.shape[1]))
    factor_OG, _ = grid.factors(name, weight_OI)
    exact_OG = scheme.qmin - low_OG * factor_OG / scale_OG
    return scale_OG, exact_OG.clamp(zero_OG - NEAR, zero_OG + NEAR).clamp(scheme.qmin, scheme.qmax)


@dataclass(frozen=True, kw_only=True)
class StepSize(GridStep):
    """Learn scales and zero-points.

    `start` is where scales begin: at the least error of the weights, where each counts by its input (`inputs`) or all
    alike (`mse`), or at full ranges as in EfficientQAT (`range`).
    `rate` is how far one AdamW step moves a scale, relative to its first value, `zero_rate` a zero-point, in codes. A
    zero-point that moves moves by a whole code: ten times this rate did harm at all widths.
    """

    rate: float = 1e-2
    zero_rate: float = 1e-3
    start: Start = "mse"

    def __post_init__(self) -> None:
        check_start(self.start)

    @property
    def reads_inputs(self) -> Reads:  # noqa: D102
        return read_for(self.start)

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return StepGrid(state, context, self)
