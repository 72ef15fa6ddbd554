"""The zoo on one screen: every name a method string may use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from makeweight.errors import UserError
from makeweight.methods.base import Method
from makeweight.methods.block.scale import Let, Scale
from makeweight.methods.finetune.e2e import E2e
from makeweight.methods.grid.clip import Lwc, Rtn
from makeweight.methods.grid.gptq import Gptq
from makeweight.methods.grid.rounding import Rounding
from makeweight.methods.grid.search import Hqq, InputClip, MseRange, Percentile
from makeweight.methods.grid.stepsize import StepSize
from makeweight.methods.loss.augmented import Augmented
from makeweight.methods.loss.cross_layer import CrossLayer
from makeweight.methods.weight.sde import Sde
from makeweight.methods.weight.tune import Tune


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A name for several methods of the zoo, and where it comes from."""

    parts: tuple[str, ...]
    source: str


PRESETS: dict[str, Method] = {
    "rtn": Method(step=Rtn(), summary="round to nearest, nothing learned", source="baseline"),
    "lwc": Method(
        step=Lwc(), summary="learnable clipping of every group's range", source="arXiv 2308.13137 (OmniQuant)"
    ),
    "autoround": Method(
        step=Rounding(), summary="learnable rounding of every weight", source="arXiv 2309.05516 (SignRound)"
    ),
    "flipround": Method(
        step=Rounding(rate=7.0, descent="adam", own=0.75, damp=0.5, start="inputs"),
        summary="learnable rounding by what a flip of each code costs",
        source="ours; arXiv 2309.05516 for the offsets, 1206.6464 for curvature",
    ),
    "stepsize": Method(
        step=StepSize(),
        summary="learnable step sizes and zero-points",
        source="arXiv 1902.08153 (LSQ), 2407.11062 (EfficientQAT)",
    ),
    "mse": Method(
        step=MseRange(), summary="ranges shrunk to the least weight error", source="arXiv 2210.17323 (GPTQ's code)"
    ),
    "percentile": Method(step=Percentile(), summary="ranges that end at quantiles of every group", source="baseline"),
    "hqq": Method(
        step=Hqq(),
        summary="scales by half-quadratic splitting, integer zero-points",
        source="Badri and Shaji 2023 (Mobius Labs)",
    ),
    "clip": Method(
        step=InputClip(), summary="ranges shrunk to the least output error", source="arXiv 2306.00978 (AWQ)"
    ),
    "gptq": Method(
        step=Gptq(), summary="rounding with error feedback, alone or after learning", source="arXiv 2210.17323 (GPTQ)"
    ),
    "let": Method(
        step=Let(), summary="learnable scaling of channels, folded away", source="arXiv 2308.13137 (OmniQuant)"
    ),
    "scale": Method(
        step=Scale(), summary="scaling of channels by their inputs, folded away", source="arXiv 2306.00978 (AWQ)"
    ),
    "tune": Method(step=Tune(), summary="learnable weights (Block-AP)", source="arXiv 2407.11062 (EfficientQAT)"),
    "lsi": Method(
        step=Sde(band=0), summary="learnable singular values (sde with band 0)", source="arXiv 2406.16299 (LSI)"
    ),
    "sde": Method(step=Sde(), summary="learnable band around the singular-value core", source="arXiv 2407.15508"),
    "cl": Method(step=CrossLayer(), summary="judge a block's error one block later as well", source="arXiv 2407.15508"),
    "aug": Method(
        step=Augmented(),
        summary="hold a block to what the original makes of the same input as well",
        source="arXiv 2308.13137 (OmniQuant)",
    ),
    "e2e": Method(
        step=E2e(), summary="learnable scales and norms of the whole network", source="arXiv 2407.11062 (EfficientQAT)"
    ),
}


COMPOSED: dict[str, Composed] = {
    "omniquant": Composed(
        parts=("scale", "let", "lwc"), source="arXiv 2308.13137; it starts let at SmoothQuant's scales"
    ),
    "awq": Composed(parts=("scale", "clip"), source="arXiv 2306.00978"),
    "efficientqat": Composed(parts=("tune", "stepsize"), source="arXiv 2407.11062, its block-wise stage"),
}
"""Published methods that are several of ours."""


@cache
def zoo() -> dict[str, Method]:
    """Return the table, with what installed packages add through the entry-point group `makeweight.methods`.

    An entry point names a `Method`. Raises UserError where one has the name of a method that is already there.
    """
    found = dict(PRESETS)
    for entry in entry_points(group="makeweight.methods"):
        if entry.name in found:
            raise UserError(f"two installed packages define the method {entry.name!r}: remove one of them.")
        found[entry.name] = entry.load()
    return found
