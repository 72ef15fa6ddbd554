"""Equivalent scaling: what one linear or norm gives is multiplied, channel by channel, and what reads it divided.

The block's function stays what it was, but the columns of the readers meet their grid with other sizes.
Learned (let): a factor exp(t) per channel, found with whatever else the block learns; it acts on the weights that sde
has moved. Searched (scale): the source is divided by s = mean(x^2)^(rho / 2) / its geometric middle, with the exponent
rho of each edge that leaves the smallest error at the readers' outputs under plain rounding. It is folded in before
anything else is built, so that sde takes its singular values of the scaled weights.
Learning goes a short way: it starts from one or, behind `scale`, from what was searched, which is a tenth less error at
3 bits than learning alone reaches (LOG.md). OmniQuant starts at SmoothQuant's scales; our `omniquant` is scale+let+lwc.
Query and key may exchange factors too. Where a row's grid follows its weights they change nothing. What OmniQuant adds
to the outputs of norms and values that have a bias (OPT), before activations are rounded, is left out.
Source: OmniQuant (arXiv 2308.13137, section 3.3) for learning it, AWQ (arXiv 2306.00978, section 3.2) for the search.
AWQ judges by the output of the attention or the MLP; here each reader is judged by its own, from second moments alone.
Where inputs are rounded as well, what that adds is counted too: it is least where no channel stands out of a token.

Shapes: O out, I in, C channels of an edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from makeweight.methods.base import BlockMap, BlockStep, Context, Inputs, Learnables, Params, Reads
from makeweight.models.rescale import channels, per_reader, per_source, qk_free, rescale, rescale_qk
from makeweight.models.spec import Edge, ModelSpec
from makeweight.numerics.grid import from_codes, grouped, qparams, ranges, to_codes

SHARES = tuple(step / 20 for step in range(20))
"""The exponents that are tried; 0 scales nothing."""
TINY = 1e-8
"""The mean square of inputs under which channels count as equally small."""
PEAK = 3.0
"""How far a token's largest value lies out, in root mean squares of the largest channel."""
QUERY_KEY = "query-key"


def key_of(edge: Edge) -> str:
    """Name an edge as a parameter may be named."""
    return edge.src.replace(".", "-")


class LearnedScales(BlockMap):
    """Every edge times exp(t), one t per channel, all zero before learning."""

    def __init__(self, params: Params, context: Context, *, rate: float, down: bool) -> None:
        super().__init__()
        assert context.spec is not None, "a step that needs edges is refused where there are none"
        self.spec, self.config, self.rate = context.spec, context.config, rate
        self.edges = tuple(edge for edge in self.spec.edges if down or not into_down(self.spec, edge))
        device = next(iter(params.values())).device
        sizes: dict[str, tuple[int, ...]] = {
            key_of(edge): (channels(params, self.spec, self.config, edge),) for edge in self.edges
        }
        if self.spec.qk is not None:
            sizes[QUERY_KEY] = qk_free(self.spec, self.config)
        self.logs = nn.ParameterDict({key: torch.zeros(size, device=device) for key, size in sizes.items()})

    def forward(self, state: Params) -> Params:  # noqa: D102
        for edge in self.edges:
            state = rescale(state, self.spec, self.config, edge, self.logs[key_of(edge)].exp())
        if QUERY_KEY in self.logs:
            state = rescale_qk(state, self.spec, self.config, self.logs[QUERY_KEY].exp())
        return state

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        yield Learnables("let.rate", tuple(self.logs.values()), self.rate)


@dataclass(frozen=True, kw_only=True)
class Let(BlockStep):
    """Learn equivalent scales; `down` includes what the MLP's last linear reads, which OmniQuant leaves out."""

    rate: float = 2e-2
    down: bool = False

    def build(self, params: Params, context: Context) -> BlockMap:  # noqa: D102
        return LearnedScales(params, context, rate=self.rate, down=self.down)


class FoundScales(BlockMap):
    """Every edge times fixed factors."""

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__()
        assert context.spec is not None and context.inputs is not None, "`needs_edges` and `reads_inputs` ask for them"
        self.spec, self.config = context.spec, context.config
        self.scales = {edge: search(params, context, context.spec, edge, context.inputs) for edge in self.spec.edges}

    def forward(self, state: Params) -> Params:  # noqa: D102
        for edge, scale_C in self.scales.items():
            state = rescale(state, self.spec, self.config, edge, scale_C)
        return state


@dataclass(frozen=True, kw_only=True)
class Scale(BlockStep):
    """Search equivalent scales by what enters the linears; learns nothing."""

    learns: ClassVar[bool] = False

    @property
    def reads_inputs(self) -> Reads:  # noqa: D102
        return "products"

    def build(self, params: Params, context: Context) -> BlockMap:  # noqa: D102
        return FoundScales(params, context)


def into_down(spec: ModelSpec, edge: Edge) -> bool:
    """Say whether an edge leads into the MLP's last linear, past its nonlinearity."""
    return edge.src not in spec.norms and (spec.heads is None or edge.src != spec.heads[0])


@torch.no_grad()
def search(params: Params, context: Context, spec: ModelSpec, edge: Edge, inputs: Inputs) -> Tensor:
    """Return the factors (C,) of an edge's source that leave its readers' outputs the smallest error, fp32."""
    readers = [(params[f"{name}.weight"], inputs.moment(name)) for name in edge.dst]
    energies = [energy(weight_OI, moment_II) for weight_OI, moment_II in readers]
    moment_II = inputs.moment(edge.dst[0])
    size_C = per_source(moment_II.diagonal(), spec, context.config, edge).clamp(min=TINY).sqrt()
    best, found_C = float("inf"), torch.ones_like(size_C)
    for share in SHARES:
        power_C = size_C.pow(share)
        # A factor of the whole edge changes nothing; this one keeps the norm's weights near what they were.
        scale_C = (power_C.max() * power_C.min()).sqrt() / power_C
        columns_I = per_reader(scale_C, spec, context.config, edge)
        losses = [lost(weight_OI, columns_I, moment_II, context) for weight_OI, moment_II in readers]
        error = sum(float(loss / whole) for loss, whole in zip(losses, energies, strict=True))
        if error < best:
            best, found_C = error, scale_C
    return found_C


def energy(weight_OI: Tensor, moment_II: Tensor) -> Tensor:
    """Return the mean over tokens of ||W x||^2, a scalar."""
    return ((weight_OI @ moment_II) * weight_OI).sum()


def lost(weight_OI: Tensor, columns_I: Tensor, moment_II: Tensor, context: Context) -> Tensor:
    """Return the energy of what rounding W / columns, and inputs that are rounded, adds to the outputs, a scalar."""
    scheme = context.scheme
    weight_OGS = grouped(weight_OI / columns_I, scheme.group_of(weight_OI.shape[1], "a linear"))
    scale_OG, zero_OG = qparams(*ranges(weight_OGS), scheme, context.scale_dtype)
    rounded_OI = from_codes(to_codes(weight_OGS, scale_OG, zero_OG, scheme), scale_OG, zero_OG).flatten(1)
    error = energy(rounded_OI * columns_I - weight_OI, moment_II)
    if scheme.activations < 16:
        # Errors are spread evenly over a step, independently for every input: step^2 / 12 through each weight.
        peak = PEAK * (moment_II.diagonal().sqrt() * columns_I).max()
        step = 2 * peak / (2**scheme.activations - 1)
        error = error + step.square() / 12 * (weight_OI / columns_I).square().sum()
    return error
