"""Learned rounding (SignRound, AutoRound): an offset per weight chooses between the two nearest codes.

w_hat = scale * (clip(round(w / scale + v) + zero) - zero), with v and a factor for each end of every group's range
learned by the sign of the gradient. A run's rates add up to half a step for `rate` 1, so that v can just reach the
neighbouring code and no further. Ranges begin where they cost the weights least (mse): where codes are few, full ones
are too wide for a run to shrink them as far. SDE below moves the weights under v: both are learned at once, v from
where the moved weight lies.
Source: arXiv 2309.05516 (SignRound); intel/auto-round for the ranges and the rate of 1 / steps. The start is ours.

Shapes: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from makeweight.errors import UserError
from makeweight.methods.base import Context, Grid, GridStep, Learnables, State
from makeweight.methods.grid.clip import RangeGrid
from makeweight.methods.grid.search import Start, check_start, first_ranges

REACH = 0.5


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

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        params = (*self.offsets.values(), *self.low.values(), *self.high.values())
        yield Learnables("autoround", params, self.step.rate, 1 / max(1, self.context.steps), self.step.descent)

    def constrain(self) -> None:  # noqa: D102
        for offset_OI in self.offsets.values():
            offset_OI.clamp_(-REACH, REACH)
        for factor_OG in (*self.low.values(), *self.high.values()):
            factor_OG.clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class Rounding(GridStep):
    """Learn the rounding of every weight; `rate` is twice the way, in steps of the scale, that a run can travel.

    `start` is where ranges begin: `mse` at the least error of the weights, `range` at their full width, as in SignRound
    and auto-round. `descent` is `sign`, or `adam` for AdamW, whose moments take two more numbers for every weight.
    """

    rate: float = 1.0
    start: Start = "mse"
    descent: Literal["adam", "sign"] = "sign"

    def __post_init__(self) -> None:
        check_start("autoround", self.start)
        if self.descent not in ("adam", "sign"):
            raise UserError(f"autoround: descent {self.descent!r} is unknown: choose adam or sign.")

    @property
    def weight_bytes(self) -> int:  # noqa: D102
        return 3 * 4 if self.descent == "sign" else 5 * 4

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return RoundingGrid(state, context, self)
