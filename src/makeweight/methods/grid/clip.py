"""Round-to-nearest (RTN) and learnable weight clipping (LWC).

LWC shrinks the two ends of every group's range by learned factors, sigmoid(logit); the range itself follows the
weights, so it composes with anything that moves them. RTN is the same grid with both factors at one.
Source: OmniQuant, arXiv 2308.13137, section 3.2.

Shapes: O out, I in, G groups per row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from makeweight.methods.base import Context, Grid, GridStep, Learnables, State
from makeweight.numerics.flips import Flips
from makeweight.numerics.gptq import Ranges
from makeweight.numerics.grid import clipped_grid, grouped, qparams, ranges, to_codes
from makeweight.numerics.qtensor import QTensor


class GroupedGrid(Grid):
    """A grid with a scale and a zero-point for every group, which error feedback can round within."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    @abstractmethod
    def qparams(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales, as they are stored, and the integer zero-points of a matrix, both (O, G)."""

    @abstractmethod
    def group_qparams(self, name: str, weight_OI: Tensor) -> Ranges:
        """Return what gives a group's scale and zero-point once error feedback has moved its weights."""

    def offset(self, name: str) -> Tensor | None:
        """Return what is added to a matrix before rounding, in steps (O, I), None for nothing."""
        return None

    @torch.no_grad()
    def codes(self, state: State) -> dict[str, QTensor]:  # noqa: D102
        return {name: self._codes(name, weight) for name, weight in state.items()}

    def _codes(self, name: str, weight_OI: Tensor) -> QTensor:
        scale_OG, zero_OG = self.qparams(name, weight_OI)
        weight_OGS = grouped(weight_OI, weight_OI.shape[1] // scale_OG.shape[1])
        offset_OI = self.offset(name)
        offset_OGS = None if offset_OI is None else offset_OI.view_as(weight_OGS)
        codes_OGS = to_codes(weight_OGS, scale_OG, zero_OG, self.context.scheme, offset_OGS)
        return held(codes_OGS.flatten(1), scale_OG, zero_OG, self.context)


def held(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, context: Context) -> QTensor:
    """Store codes, scales and zero-points that are still floats."""
    return QTensor(
        codes_OI=codes_OI.to(torch.int8),
        scale_OG=scale_OG.to(context.scale_dtype),
        zero_OG=None if context.scheme.symmetric else zero_OG.to(torch.int8),
        scheme=context.scheme,
    )


class RangeGrid(GroupedGrid):
    """Quantize every matrix from its own group ranges, times the two factors of `factors`."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.flips: Mapping[str, Flips] = {}
        """What a flip of each code costs, for a grid that learns by it."""

    def factors(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the low and the high end of each range, both (O, G)."""
        groups = weight_OI.shape[1] // self.context.scheme.group_of(weight_OI.shape[1], name)
        ones_OG = weight_OI.new_ones(weight_OI.shape[0], groups)
        return ones_OG, ones_OG

    def forward(self, state: State) -> State:  # noqa: D102
        scheme, given = self.context.scheme, {"scale_dtype": self.context.scale_dtype, "dtype": self.context.dtype}
        return {
            name: clipped_grid(
                weight,
                *self.factors(name, weight),
                scheme,
                offset_OI=self.offset(name),
                flips=self.flips.get(name),
                **given,
            )
            for name, weight in state.items()
        }

    def qparams(self, name: str, weight_OI: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        low_factor_OG, high_factor_OG = self.factors(name, weight_OI)
        weight_OGS = grouped(weight_OI, weight_OI.shape[1] // low_factor_OG.shape[1])
        return self._qparams(weight_OGS, low_factor_OG, high_factor_OG)

    def group_qparams(self, name: str, weight_OI: Tensor) -> Ranges:  # noqa: D102
        low_factor_OG, high_factor_OG = self.factors(name, weight_OI)
        return lambda part_OS, group: self._qparams(part_OS, low_factor_OG[:, group], high_factor_OG[:, group])

    def _qparams(self, part: Tensor, low_factor: Tensor, high_factor: Tensor) -> tuple[Tensor, Tensor]:
        low, high = ranges(part)
        return qparams(low * low_factor, high * high_factor, self.context.scheme, self.context.scale_dtype)


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
        yield Learnables("lwc.rate", (*self.low.values(), *self.high.values()), self.rate)


@dataclass(frozen=True, kw_only=True)
class Rtn(GridStep):
    """Round to the nearest point of the full range; learns nothing."""

    learns: ClassVar[bool] = False

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return RangeGrid(context)


@dataclass(frozen=True, kw_only=True)
class Lwc(GridStep):
    """Learnable weight clipping; `logit` 4 starts the ranges at 0.982 of their width."""

    logit: float = 4.0
    rate: float = 0.2

    def build(self, state: State, context: Context) -> Grid:  # noqa: D102
        return ClipGrid(state, context, logit=self.logit, rate=self.rate)
