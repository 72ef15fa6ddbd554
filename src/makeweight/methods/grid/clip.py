"""Round-to-nearest (RTN) and learnable weight clipping (LWC).

LWC shrinks the two ends of every group's range by learned factors, sigmoid(logit); the range itself follows the
weights, so it composes with anything that moves them. RTN is the same grid with both factors at one.
Source: OmniQuant, arXiv 2308.13137, section 3.2.

Shapes: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from makeweight.methods.base import Context, Grid, GridStep, Learnables, State
from makeweight.numerics.grid import clipped_grid, grouped, qparams, ranges, to_codes
from makeweight.numerics.qtensor import QTensor


class RangeGrid(Grid):
    """Quantize every matrix from its own group ranges, times the two factors of `factors`."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def factors(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the low and the high end of each range, both (O, G)."""
        groups = weight_OI.shape[1] // self.context.scheme.group_of(weight_OI.shape[1], name)
        ones_OG = weight_OI.new_ones(weight_OI.shape[0], groups)
        return ones_OG, ones_OG

    def offset(self, name: str) -> Tensor | None:
        """Return what is added to a matrix before rounding, in steps (O, I), None for nothing."""
        return None

    def forward(self, state: State) -> State:  # noqa: D102
        scheme, given = self.context.scheme, {"scale_dtype": self.context.scale_dtype, "dtype": self.context.dtype}
        return {
            name: clipped_grid(weight, *self.factors(name, weight), scheme, offset_OI=self.offset(name), **given)
            for name, weight in state.items()
        }

    @torch.no_grad()
    def codes(self, state: State) -> dict[str, QTensor]:  # noqa: D102
        return {name: self._codes(name, weight) for name, weight in state.items()}

    def _codes(self, name: str, weight_OI: Tensor) -> QTensor:
        scheme, scale_dtype = self.context.scheme, self.context.scale_dtype
        low_factor_OG, high_factor_OG = self.factors(name, weight_OI)
        weight_OGS = grouped(weight_OI, weight_OI.shape[1] // low_factor_OG.shape[1])
        low_OG, high_OG = ranges(weight_OGS)
        scale_OG, zero_OG = qparams(low_OG * low_factor_OG, high_OG * high_factor_OG, scheme, scale_dtype)
        offset_OI = self.offset(name)
        offset_OGS = None if offset_OI is None else offset_OI.view_as(weight_OGS)
        codes_OGS = to_codes(weight_OGS, scale_OG, zero_OG, scheme, offset_OGS)
        return QTensor(
            codes_OI=codes_OGS.flatten(1).to(torch.int8),
            scale_OG=scale_OG.to(scale_dtype),
            zero_OG=None if scheme.symmetric else zero_OG.to(torch.int8),
            scheme=scheme,
        )


class ClipGrid(RangeGrid):
    """Ranges shrunk by learned factors."""

    def __init__(self, state: State, context: Context, *, logit: float, rate: float) -> None:
        super().__init__(context)
        self.rate = rate
        self.names = {name: name.replace(".", "-") for name in state}
        self.low, self.high = nn.ParameterDict(), nn.ParameterDict()
        for name, weight_OI in state.items():
            ones_OG, _ = super().factors(name, weight_OI)
            self.low[self.names[name]] = nn.Parameter(ones_OG * logit)
            self.high[self.names[name]] = nn.Parameter(ones_OG * logit)

    def factors(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.low[self.names[name]].sigmoid(), self.high[self.names[name]].sigmoid()

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        yield Learnables("lwc", (*self.low.values(), *self.high.values()), self.rate)


@dataclass(frozen=True, kw_only=True)
class Rtn(GridStep):
    """Round to the nearest point of the full range; learns nothing."""

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return RangeGrid(context)


@dataclass(frozen=True, kw_only=True)
class Lwc(GridStep):
    """Learnable weight clipping; `logit` 4 starts the ranges at 0.982 of their width."""

    logit: float = 4.0
    rate: float = 0.2

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return ClipGrid(state, context, logit=self.logit, rate=self.rate)
