"""Learned step sizes (LSQ) and zero-points: scales that follow the loss, no longer the weights.

w_hat = scale * (clip(round(w / scale) + zero) - zero). Scales and, on an asymmetric grid, zero-points begin as those
of round-to-nearest and are learned on their own; with learned weights below (tune) this is the block-wise stage of
EfficientQAT. Zero-points are rounded and stay in the code range.
Sources: arXiv 1902.08153 (LSQ); arXiv 2407.11062 (EfficientQAT, Block-AP). Learning a factor of the first scale, so
that one rate fits all models, is ours.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from makeweight.methods.base import Context, Grid, GridStep, Learnables, State
from makeweight.methods.grid.clip import GroupedGrid, RangeGrid
from makeweight.numerics.gptq import Ranges
from makeweight.numerics.stepgrid import stepped_grid, stored

LEAST = 0.01
"""The smallest share of its first scale that a scale can shrink to."""

Steps = dict[str, tuple[Tensor, Tensor]]
"""Scales and zero-points, both (O, G), by linear name."""


class FixedGrid(GroupedGrid):
    """Quantize every matrix with scales and zero-points that do not follow its weights."""

    def __init__(self, steps: Steps, context: Context) -> None:
        super().__init__(context)
        self.first = steps

    def steps(self, name: str) -> tuple[Tensor, Tensor]:
        """Return scales and zero-points before they are rounded to what is stored, both (O, G)."""
        return self.first[name]

    def forward(self, state: State) -> State:  # noqa: D102
        scheme, given = self.context.scheme, {"scale_dtype": self.context.scale_dtype, "dtype": self.context.dtype}
        return {name: stepped_grid(weight, *self.steps(name), scheme, **given) for name, weight in state.items()}

    def qparams(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return stored(*self.steps(name), self.context.scheme, self.context.scale_dtype)

    def group_qparams(self, name: str, weight_OI: Tensor) -> Ranges:  # noqa: D102
        scale_OG, zero_OG = self.qparams(name, weight_OI)
        return lambda _, group: (scale_OG[:, group], zero_OG[:, group])


class StepGrid(FixedGrid):
    """Scales times learned factors, and learned zero-points where the grid has any."""

    def __init__(self, state: State, context: Context, step: StepSize) -> None:
        plain = RangeGrid(context)
        with torch.no_grad():
            super().__init__({name: plain.qparams(name, weight) for name, weight in state.items()}, context)
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
        yield Learnables("stepsize", tuple(self.factors.values()), self.step.rate)
        if self.zeros:
            yield Learnables("stepsize.zero", tuple(self.zeros.values()), self.step.zero_rate)

    def constrain(self) -> None:  # noqa: D102
        for factor_OG in self.factors.values():
            factor_OG.clamp_(min=LEAST)
        for zero_OG in self.zeros.values():
            zero_OG.clamp_(self.context.scheme.qmin, self.context.scheme.qmax)


@dataclass(frozen=True, kw_only=True)
class StepSize(GridStep):
    """Learn scales and zero-points.

    `rate` is how far one AdamW step moves a scale, relative to its first value, `zero_rate` a zero-point, in codes. A
    zero-point that moves moves by a whole code: ten times this rate did harm at all widths.
    """

    rate: float = 1e-2
    zero_rate: float = 1e-3

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return StepGrid(state, context, self)
