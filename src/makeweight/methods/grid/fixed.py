"""The grid whose scales and zero-points are given and do not follow the weights.

Shapes: O out, G groups per row.
"""

from __future__ import annotations

from torch import Tensor

from makeweight.methods.base import Context, State
from makeweight.methods.grid.clip import GroupedGrid
from makeweight.numerics.gptq import Ranges
from makeweight.numerics.stepgrid import stepped_grid, stored

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
