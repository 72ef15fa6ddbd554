"""GPTQ: rounding with error feedback, alone or after learned maps and ranges.

Learned maps (sde), ranges (lwc) and scales (stepsize) are learned under plain rounding, and ranges may be searched
(mse); GPTQ then rounds the weights that are left, within those ranges and scales. After ranges that is a gain. After a
band it mostly is not (LOG.md): the band's weights are good once they are rounded to the nearest code, and GPTQ takes
their own outputs for its target. So a block that has learned something keeps its nearest codes where these have the
smaller held-out error (sweep/run.py). Under learned rounding (autoround, flipround) it would undo what was learned.
Source: arXiv 2210.17323; the options are those of its reference code, act-order with static groups by default.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.methods.base import Context, Grid, RoundStep, Step
from makeweight.methods.grid.clip import GroupedGrid, held
from makeweight.methods.grid.rounding import Rounding
from makeweight.numerics.gptq import feedback_codes
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.svd import LinAlgError


@dataclass(frozen=True, kw_only=True)
class Gptq(RoundStep):
    """Round linear by linear with the inputs that the quantized blocks before really give.

    `damp` is added to the diagonal, a share of its mean, and grows where it must; `act_order` takes large inputs first.
    Groups keep the ranges of their first weights then, since files hold groups of inputs that lie together;
    `static_groups` has them do so in the inputs' own order as well.
    """

    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise UserError(f"damp {self.damp} must lie between 0 and 1, a share of the diagonal's mean.")

    def conflicts(self, others: tuple[Step, ...]) -> str | None:  # noqa: D102
        if any(isinstance(other, Rounding) for other in others):
            return "gptq would round again what learned rounding has chosen"
        return None

    @torch.no_grad()
    def codes(  # noqa: D102
        self, name: str, weight_OI: Tensor, hessian_II: Tensor, grid: Grid, context: Context
    ) -> tuple[QTensor, dict[str, float]]:
        assert isinstance(grid, GroupedGrid), "every grid of the zoo has groups"
        group = context.scheme.group_of(weight_OI.shape[1], name)
        of_group = grid.group_qparams(name, weight_OI)
        try:
            codes_OI, scale_OG, zero_OG, damp = feedback_codes(
                weight_OI,
                hessian_II,
                context.scheme,
                group,
                of_group,
                act_order=self.act_order,
                damp=self.damp,
                static_groups=self.static_groups,
            )
        except LinAlgError as error:
            raise UserError(f"gptq: {error} for {name}: give more or other calibration text.") from error
        return held(codes_OI, scale_OG, zero_OG, context), {} if damp == self.damp else {f"damp.{name}": damp}
