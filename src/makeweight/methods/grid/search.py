"""Ranges chosen once, and nothing learned: from the weights alone (mse, percentile, hqq) or with their inputs (clip).

mse, percentile and clip choose factors of every group's range, which then follows the weights as it does under lwc;
hqq chooses scales and zero-points themselves. Alone they take seconds; under learned maps (sde) they are chosen from
the weights that first reach the grid.
Sources: the range search of GPTQ's reference code (arXiv 2210.17323); Badri and Shaji, Half-Quadratic Quantization,
2023 (Mobius Labs); AWQ (arXiv 2306.00978) for clip; counting weights by their inputs' mean squares is what llama.cpp
calls an importance matrix.

Shapes: O out, I in, G groups per row, S inputs per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.methods.base import Context, Grid, GridStep, Reads, State
from makeweight.methods.grid.clip import RangeGrid
from makeweight.methods.grid.fixed import FixedGrid
from makeweight.numerics.grid import grouped
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.search import best_factors, half_quadratic, power_error, quantile_factors

SHARES, WIDE_SHARE = {2: 0.95, 3: 0.99}, 0.999
"""The quantiles of percentile, by bits and beyond: least squared error of three blocks of SmolLM2-135M (LOG.md)."""


class FactorGrid(RangeGrid):
    """Ranges times factors that stay."""

    def __init__(self, factors: dict[str, tuple[Tensor, Tensor]], context: Context) -> None:
        super().__init__(context)
        self.found = factors

    def factors(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.found[name]


def _each(
    state: State, context: Context, find: Callable[[str, Tensor], tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Apply `find` to the name and the groups (O, G, S) of every matrix."""
    size = context.scheme.group_of
    return {name: find(name, grouped(weight, size(weight.shape[1], name))) for name, weight in state.items()}


def _both(factor_OG: Tensor) -> tuple[Tensor, Tensor]:
    return factor_OG, factor_OG


def _shares(least: float, step: float) -> list[float]:
    return [1 - step * i for i in range(int((1 - least) / step + 1e-9) + 1)]


def _check_shares(least: float, step: float) -> None:
    if not (0 < least <= 1 and 0 < step < 1):
        raise UserError(f"least {least} and step {step} must lie between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class MseRange(GridStep):
    """Shrink both ends of every range by the factor that makes the sum of |w - w_hat|^`power` smallest.

    Factors fall from 1 to `least` by `step`. With `inputs` each weight counts as much as the mean square of its input.
    """

    learns: ClassVar[bool] = False
    power: float = 2.0
    least: float = 0.3
    step: float = 0.02
    inputs: bool = False

    @property
    def reads_inputs(self) -> Reads:  # noqa: D102
        return "squares" if self.inputs else ""

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UserError(f"power {self.power} must lie above 0; 2 is the squared error.")
        _check_shares(self.least, self.step)

    def build(self, state: State, context: Context) -> FactorGrid:  # noqa: D102
        shares = _shares(self.least, self.step)

        def find(name: str, weight_OGS: Tensor) -> tuple[Tensor, Tensor]:
            counts_GS = None
            if self.inputs:
                assert context.inputs is not None, "`reads_inputs` asks for them"
                counts_GS = context.inputs.square(name).view(weight_OGS.shape[1:])

            def error(delta_OGS: Tensor) -> Tensor:
                return power_error(delta_OGS, self.power, counts_GS)

            return _both(best_factors(weight_OGS, context.scheme, context.scale_dtype, shares=shares, error=error))

        return FactorGrid(_each(state, context, find), context)


Start = Literal["inputs", "mse", "range"]
"""Where learned ranges begin: at the least error of the weights, each by its input or all alike, or at full width."""


def check_start(start: str) -> None:
    """Raise UserError for a start that there is not."""
    if start not in get_args(Start):
        raise UserError(f"start {start!r} is unknown: choose inputs, mse or range.")


def first_ranges(start: Start, state: State, context: Context) -> RangeGrid:
    """Return the grid that learned ranges begin as."""
    return RangeGrid(context) if start == "range" else MseRange(inputs=start == "inputs").build(state, context)


def read_for(start: Start) -> Reads:
    """Return what a start reads of the inputs of linears."""
    return "squares" if start == "inputs" else ""


@dataclass(frozen=True, kw_only=True)
class InputClip(GridStep):
    """Shrink both ends of every range by the factor that costs its linear's output least, group by group.

    Factors fall from 1 to `least` by `step`. AWQ leaves query and key as they are and looks at 512 tokens; here every
    matrix is searched, with the second moments of all inputs.
    """

    learns: ClassVar[bool] = False
    least: float = 0.5
    step: float = 0.02

    @property
    def reads_inputs(self) -> Reads:  # noqa: D102
        return "products"

    def __post_init__(self) -> None:
        _check_shares(self.least, self.step)

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        inputs, shares = context.inputs, _shares(self.least, self.step)
        assert inputs is not None, "`reads_inputs` asks for them"

        def find(name: str, weight_OGS: Tensor) -> tuple[Tensor, Tensor]:
            groups, size = weight_OGS.shape[1:]
            # The blocks of the moments along the diagonal: what a group's errors cost together.
            moment_GSS = inputs.moment(name).view(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)

            def error(delta_OGS: Tensor) -> Tensor:
                return (torch.einsum("ogs,gst->ogt", delta_OGS, moment_GSS) * delta_OGS).sum(-1)

            return _both(best_factors(weight_OGS, context.scheme, context.scale_dtype, shares=shares, error=error))

        return FactorGrid(_each(state, context, find), context)


@dataclass(frozen=True, kw_only=True)
class Percentile(GridStep):
    """Put the ends of every range at the quantiles 1 - `share` and `share` of its group, interpolated.

    0 takes the share that cost weights least where it was measured: 0.95 at 2 bits, 0.99 at 3, 0.999 from 4 on.
    """

    learns: ClassVar[bool] = False
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.share and not 0.5 < self.share <= 1:
            raise UserError(
                f"share {self.share} must lie above 0.5 and not above 1, the full range; 0 goes by the bits."
            )

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        share = self.share or SHARES.get(context.scheme.bits, WIDE_SHARE)
        return FactorGrid(_each(state, context, lambda _, part: quantile_factors(part, share)), context)


@dataclass(frozen=True, kw_only=True)
class Hqq(GridStep):
    """Half-quadratic quantization: scales and zero-points that make the sum of |w - w_hat|^`power` small.

    Its own zero-points are floats, so its grid is freer than this one: here they are integers within the code range,
    as every format needs. Rounded so, they hardly ever leave those of rtn; what gains is that scales, which hqq
    keeps, are solved for as well.
    """

    learns: ClassVar[bool] = False
    power: float = 0.7
    steps: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.power < 1:
            raise UserError(f"power {self.power} must lie between 0 and 1; mse is for larger ones.")
        if self.steps < 1:
            raise UserError(f"steps {self.steps} must be at least 1.")

    def misfit(self, scheme: Scheme) -> str | None:  # noqa: D102
        return f"it solves for zero-points, of which {scheme} has none; mse does not" if scheme.symmetric else None

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        scheme, given = context.scheme, {"power": self.power, "steps": self.steps}
        found = _each(state, context, lambda _, part: half_quadratic(part, scheme, context.scale_dtype, **given))
        return FixedGrid(found, context)
