"""Learned rounding: an offset per weight chooses between the two nearest codes.

w_hat = scale * (clip(round(w / scale + v) + zero) - zero), with v and a factor for each end of every group's range
learned. Ranges begin where they cost least, for autoround with all weights alike (mse), for flipround each by its input
(inputs): where codes are few, full ones are too wide for a run to shrink them as far. SDE below moves the weights under
v: both are learned at once, v from where the moved weight lies. The band can take a weight further than the half step
that v has, all of a matrix at once; that pays at 2 bits, where steps are large, and at 3 little or nothing (LOG.md).

autoround is SignRound: straight-through, by the sign of the gradient. A run's rates add up to half a step for `rate` 1,
so that v can just reach the neighbouring code and no further.

flipround asks what a flip costs (numerics/flips.py, sweep/curvature.py). What is left of the slope is what the other
weights' errors ask of this one, and v rests where that is balanced: a code flips only where it pays, as in GPTQ, but
with all linears of a block at once and by the block's real loss. At rest the size of a slope counts, not its sign,
hence AdamW. It fits calibration text so well that it fits what is peculiar to it: damping holds it back.
Sources: arXiv 2309.05516 (SignRound) and intel/auto-round for autoround; arXiv 1206.6464 for estimating curvature.
The start, and flipround, are ours.

Shapes: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from makeweight.errors import UserError
from makeweight.methods.base import Context, Grid, GridStep, Learnables, Reads, State
from makeweight.methods.grid.clip import RangeGrid
from makeweight.methods.grid.search import Start, check_start, first_ranges, read_for
from makeweight.numerics.flips import Curvature, Flips

REACH = 0.5
BETAS = (0.5, 0.99)
"""What AdamW keeps of older slopes: less than usual, for every flip changes what other flips pay (LOG.md)."""
LEAST_STEPS = 200
"""Shorter runs of AdamW step no further than one of so many: three times a thirtieth ruined a block (LOG.md)."""


class RoundingGrid(RangeGrid):
    """Ranges shrunk by learned factors, and an offset of at most half a step for every weight."""

    def __init__(self, state: State, context: Context, step: Rounding) -> None:
        super().__init__(context)
        self.step = step
        self.names = {name: name.replace(".", "-") for name in state}
        self.offsets, self.low, self.high = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        start = first_ranges(step.start, state, context)
        for name, weight_OI in state.items():
            low_OG, high_OG = start.factors(name, weight_OI)
            self.offsets[self.names[name]] = nn.Parameter(torch.zeros_like(weight_OI))
            self.low[self.names[name]] = nn.Parameter(low_OG.clone())
            self.high[self.names[name]] = nn.Parameter(high_OG.clone())

    def factors(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.low[self.names[name]], self.high[self.names[name]]

    def offset(self, name: str) -> Tensor:  # noqa: D102
        return self.offsets[self.names[name]]

    def take_curvature(self, find: Callable[[], Mapping[str, Curvature]]) -> None:  # noqa: D102
        step = self.step
        if step.by_flips:
            self.flips = {name: Flips(found, step.own, step.damp) for name, found in find().items()}

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        params = (*self.offsets.values(), *self.low.values(), *self.high.values())
        name = "flipround.rate" if self.step.by_flips else "autoround.rate"
        least = LEAST_STEPS if self.step.descent == "adam" else 1
        unit = 1 / max(least, self.context.steps)
        yield Learnables(name, params, self.step.rate, unit, self.step.descent, BETAS)

    def constrain(self) -> None:  # noqa: D102
        for offset_OI in self.offsets.values():
            offset_OI.clamp_(-REACH, REACH)
        for factor_OG in (*self.low.values(), *self.high.values()):
            factor_OG.clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class Rounding(GridStep):
    """Learn the rounding of every weight; `rate` is twice the way, in steps of the scale, that a run can travel.

    By AdamW, runs of fewer than 200 steps travel less: each step is as far as one of 200.

    `start` is where ranges begin: at the least error of the weights, where each counts by its input (`inputs`) or all
    alike (`mse`), or at full width as in SignRound and auto-round (`range`). `descent` is `sign`, or `adam` for AdamW,
    whose moments take two more numbers for every weight. `own` is the share of a weight's own pull that is taken out: 0
    is straight-through, 1 all of it. `damp` adds that share of the curvature to what moving a weight from where it was
    costs.
    """

    rate: float = 1.0
    start: Start = "mse"
    descent: Literal["adam", "sign"] = "sign"
    own: float = 0.0
    damp: float = 0.0

    def __post_init__(self) -> None:
        check_start(self.start)
        if self.descent not in ("adam", "sign"):
            raise UserError(f"descent {self.descent!r} is unknown: choose adam or sign.")
        if not (0 <= self.own <= 1 and self.damp >= 0):
            raise UserError(f"own {self.own} must lie between 0 and 1, damp {self.damp} not below 0.")

    @property
    def reads_inputs(self) -> Reads:  # noqa: D102
        return read_for(self.start)

    @property
    def by_flips(self) -> bool:  # noqa: D102
        return self.own > 0 or self.damp > 0

    @property
    def weight_bytes(self) -> int:  # noqa: D102
        return 3 * 4 if self.descent == "sign" else 5 * 4

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return RoundingGrid(state, context, self)
