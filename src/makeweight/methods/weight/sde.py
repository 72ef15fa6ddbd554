"""Singular-value Diagonal Expansion (SDE), and LSI as its band 0.

W = U diag(sigma) V^T becomes W + U B V^T, with B zero outside a band |i - j| <= b around the diagonal: singular
directions are rescaled (b = 0, which is LSI) and mixed with their neighbours (b >= 1). ||dW|| = ||B||, so the drift
of a weight is known without forming it. Nothing is left of it once the weight is rounded.
Sources: arXiv 2407.15508 (SDE); arXiv 2406.16299 (LSI, and its dense leading block). The relative learning rate,
the drift guard and the tiling (numerics/band.py) are ours.

Shapes: O out, I in, R = min(O, I), W = 2 b + 1 diagonals, K leading directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from makeweight.errors import UserError
from makeweight.methods.base import Context, Learnables, Map, MapStep, Stage, State, Step
from makeweight.numerics.band import band_update
from makeweight.numerics.svd import thin_svd


class BandCore(nn.Module):
    """The learned band of one matrix, in units of its median singular value; zeros of a lower rank do not count."""

    u_OR: Tensor
    v_IR: Tensor
    """Right singular vectors times the median singular value, the unit of the band."""

    def __init__(self, weight_OI: Tensor, band: int, lead: int, dtype: torch.dtype) -> None:
        super().__init__()
        u_OR, sigma_R, v_IR = thin_svd(weight_OI)
        rank = sigma_R.numel()
        found_R = sigma_R[sigma_R > rank * torch.finfo(sigma_R.dtype).eps * sigma_R[0]]
        unit = found_R.median() if found_R.numel() else sigma_R.new_zeros(())  # a matrix of zeros stays one
        self.limit = float(sigma_R.norm() / unit) if unit > 0 else math.inf
        self.register_buffer("u_OR", u_OR.to(dtype), persistent=False)
        self.register_buffer("v_IR", (v_IR * unit).to(dtype), persistent=False)
        self.band_RW = nn.Parameter(sigma_R.new_zeros(rank, 2 * min(band, rank - 1) + 1))
        self.lead_KK = nn.Parameter(sigma_R.new_zeros(min(lead, rank), min(lead, rank)))

    def update(self) -> Tensor:
        """Return dW = U B V^T, shape (O, I), in the factors' dtype."""
        dw_OI = band_update(self.band_RW, self.u_OR, self.v_IR)
        if not (k := self.lead_KK.shape[0]):
            return dw_OI
        return dw_OI + self.u_OR[:, :k] @ self.lead_KK.to(dw_OI.dtype) @ self.v_IR[:, :k].T

    @torch.no_grad()
    def drift(self) -> float:
        """Return ||dW|| / ||W|| (the band and the leading block counted apart where both are learned)."""
        return float((self.band_RW.square().sum() + self.lead_KK.square().sum()).sqrt()) / self.limit

    @torch.no_grad()
    def hold(self, drift: float) -> None:
        """Shrink B where it has moved the weight by more than `drift` of its norm."""
        if (now := self.drift()) > drift:
            self.band_RW.mul_(drift / now)
            self.lead_KK.mul_(drift / now)


class BandMap(Map):
    """W -> W + U B V^T for every linear of a block."""

    def __init__(self, state: State, context: Context, step: Sde) -> None:
        super().__init__()
        self.step, self.names = step, {name: name.replace(".", "-") for name in state}
        self.cores = nn.ModuleDict(
            {self.names[name]: BandCore(weight, step.band, step.lead, context.dtype) for name, weight in state.items()}
        )

    def _cores(self) -> Iterator[BandCore]:
        for core in self.cores.values():
            assert isinstance(core, BandCore)
            yield core

    def forward(self, state: State) -> State:  # noqa: D102
        return {name: state[name] + core.update() for name, core in zip(self.names, self._cores(), strict=True)}

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        params = [p for core in self._cores() for p in (core.band_RW, core.lead_KK) if p.numel()]
        name = "sde.rate" if self.step.band else "lsi.rate"
        yield Learnables(name, tuple(params), self.step.rate, (2 * self.step.band + 1) ** -0.5)

    def constrain(self) -> None:  # noqa: D102
        for core in self._cores():
            core.hold(self.step.drift)

    def report(self) -> dict[str, float]:  # noqa: D102
        return {f"drift.{name}": core.drift() for name, core in zip(self.names, self._cores(), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Sde(MapStep):
    """Learn `band` diagonals on either side of the singular-value core's own.

    `rate` is how far, relative to its norm, one AdamW step moves a weight whose singular values are alike, and less
    than that where they are not: every entry of B moves by rate / sqrt(2 band + 1) median singular values, so that one
    value serves every model and every band (LOG.md has the sweep). `lead` adds a dense block over the leading
    directions; `drift` bounds ||dW|| / ||W||.
    """

    stage: ClassVar[Stage] = Stage.WEIGHT
    band: int = 256
    rate: float = 1e-2
    lead: int = 0
    drift: float = 0.2

    def __post_init__(self) -> None:
        if self.band < 0 or self.lead < 0:
            raise UserError(f"band {self.band} and lead {self.lead} cannot be negative; use 0 to leave one out.")
        if not 0 < self.drift <= 1:
            raise UserError(f"drift {self.drift} must lie between 0 and 1, a fraction of the weight's norm.")

    def conflicts(self, others: tuple[Step, ...]) -> str | None:  # noqa: D102
        if any(isinstance(other, Sde) for other in others):
            return "sde contains lsi as its band 0, so only one of the two can act"
        return None

    def build(self, state: State, context: Context) -> Map:  # noqa: D102
        return BandMap(state, context, self)
