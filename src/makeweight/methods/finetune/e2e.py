"""End-to-end training of the scales (E2E-QP) and, where asked, of the codes as well.

The loss is that of the whole network, so that scales make up for what block-wise learning could not see. Nothing is
added to the result: scales are stored anyway. `norms` learns the norms' weights as well, which are stored at 16 bits.
`rounding` lets every code move: an offset is learned for each, and the code that is nearest counts. It needs six
numbers for every weight of the network at once, which the blocks before it never do.
Sources: arXiv 2407.11062 (EfficientQAT, section 3.3); arXiv 2305.17888 (LLM-QAT) for learning all weights by the
original's predictions. Learning a factor of each scale, and offsets of solved codes, are ours, as is the distance to
the original's predictions in place of the text's next token for scales (`target` has both): a few hundred sequences
teach no language.
The rate of scales grows with the square of the grid's step: at 2 bits three times the rate that suits 3 bits was best.

Shapes: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from makeweight.errors import UserError
from makeweight.methods.base import Context, FinetuneStep, Learnables, Params, Refinement, Target
from makeweight.numerics.grid import grouped
from makeweight.numerics.precision import as_stored
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.stepgrid import moved_codes, moving_grid, stored

LEAST = 0.01
"""The smallest share of its first scale that a scale can shrink to."""


def coarseness(codes: Mapping[str, QTensor]) -> float:
    """Return the mean square of the grid's step over that of the weights, or 1 where there are no weights.

    With groups of 64 about 1.4 at 2 bits, 0.4 at 3 and 0.1 at 4. Groups of zeros, whose scale is any, do not count.
    """
    steps = weights = 0.0
    for held in codes.values():
        weight_OI = held.dequantize(torch.float32)
        group = weight_OI.shape[1] // held.scale_OG.shape[1]
        used_OG = grouped(weight_OI, group).any(-1)
        steps += group * float(held.scale_OG.float().square().mul(used_OG).sum())
        weights += float(weight_OI.square().sum())
    return steps / weights if weights else 1.0


def _of_norm(name: str, rest: Params, codes: Mapping[str, QTensor]) -> bool:
    """Whether a parameter is a norm's, whatever the family calls it: one number per channel, of no linear."""
    owner, _, kind = name.rpartition(".")
    return kind in ("weight", "bias") and rest[name].ndim == 1 and owner not in codes


class Scales(Refinement):
    """Every scale of a block times a learned factor, and its norms where they are learned."""

    def __init__(self, codes: Mapping[str, QTensor], rest: Params, context: Context, step: E2e) -> None:
        super().__init__()
        self.codes, self.context, self.step = dict(codes), context, step
        self.names = {name: name.replace(".", "-") for name in (*codes, *rest)}
        self.factors = nn.ParameterDict(
            {self.names[name]: torch.ones_like(held.scale_OG, dtype=torch.float32) for name, held in codes.items()}
        )
        moving = codes if step.rounding else {}
        self.offsets = nn.ParameterDict(
            {self.names[name]: torch.zeros(held.codes_OI.shape) for name, held in moving.items()}
        )
        self.unit = coarseness(codes)
        self.moves_scales = self._reach(codes)
        self.factors.requires_grad_(self.moves_scales)
        self.rest = rest
        self.learned = tuple(name for name in rest if step.norms and _of_norm(name, rest, codes))
        self.norms = nn.ParameterDict({self.names[name]: rest[name].float().clone() for name in self.learned})

    def _reach(self, codes: Mapping[str, QTensor]) -> bool:
        """Whether all steps together could take a scale to the next value that its dtype holds."""
        finest = min((torch.finfo(held.scale_OG.dtype).eps for held in codes.values()), default=0.0)
        return self.step.rate * self.unit * self.step.steps >= finest / 4

    def scales(self, name: str) -> Tensor:
        """Return a matrix's scales as they are stored, (O, G) fp32; gradients pass."""
        held = self.codes[name]
        scale_OG = held.scale_OG.float() * self.factors[self.names[name]]
        with torch.no_grad():
            rounded_OG = stored(scale_OG, scale_OG, held.scheme, held.scale_OG.dtype)[0]
        return scale_OG + (rounded_OG - scale_OG).detach()

    def forward(self) -> dict[str, Tensor]:  # noqa: D102
        weights = {name: self._weight(name) for name in self.codes}
        norms = {name: as_stored(self.norms[self.names[name]], self.rest[name].dtype) for name in self.learned}
        rest = {**self.rest, **norms}
        return {**weights, **{name: tensor.to(self.context.dtype) for name, tensor in rest.items()}}

    def _weight(self, name: str) -> Tensor:
        held, scale_OG = self.codes[name], self.scales(name)
        zero_OG = torch.zeros_like(scale_OG) if held.zero_OG is None else held.zero_OG.float()
        offset_OI = self.offsets.get(self.names[name])
        return moving_grid(held.codes_OI, offset_OI, scale_OG, zero_OG, held.scheme, self.context.dtype)

    def learnables(self) -> Iterator[Learnables]:  # noqa: D102
        if self.moves_scales:
            yield Learnables("e2e.rate", tuple(self.factors.values()), self.step.rate, self.unit)
        if self.offsets:
            yield Learnables("e2e.rounding_rate", tuple(self.offsets.values()), self.step.rounding_rate)
        if self.learned:
            offset = self.context.spec.norm_offset if self.context.spec else 0.0
            size = torch.cat([self.rest[name].float() + offset for name in self.learned]).square().mean().sqrt()
            yield Learnables("e2e.norm_rate", tuple(self.norms.values()), self.step.norm_rate, float(size))

    def constrain(self) -> None:  # noqa: D102
        for factor_OG in self.factors.values():
            factor_OG.clamp_(min=LEAST)
        for name, held in self.codes.items():
            if (offset_OI := self.offsets.get(self.names[name])) is not None:
                codes_OI = held.codes_OI.to(offset_OI)  # int8 cannot hold every difference of codes
                offset_OI.clamp_(held.scheme.qmin - codes_OI, held.scheme.qmax - codes_OI)

    def learned_rest(self) -> Params:  # noqa: D102
        return {name: self.norms[self.names[name]].detach().to(self.rest[name]) for name in self.learned}

    @torch.no_grad()
    def freeze(self) -> dict[str, QTensor]:  # noqa: D102
        return {
            name: replace(held, codes_OI=self._codes(name), scale_OG=self.scales(name).to(held.scale_OG))
            for name, held in self.codes.items()
        }

    def _codes(self, name: str) -> Tensor:
        held, offset_OI = self.codes[name], self.offsets.get(self.names[name])
        return held.codes_OI if offset_OI is None else moved_codes(held.codes_OI, offset_OI, held.scheme)


@dataclass(frozen=True, kw_only=True)
class E2e(FinetuneStep):
    """Learn all scales at once for `steps` steps of `batch_size` sequences, and with `rounding` all codes.

    Scales of fine grids stay, as bfloat16 ones at 7 and 8 bits by default: all steps together would not take them to
    the next value that they can have.

    `rate` is how far one AdamW step moves a scale, relative to its first value, times the block's `coarseness`;
    `norm_rate` a norm's weight, relative to their typical size; `rounding_rate` a code, in codes: what is nearest
    changes beyond half of one.
    """

    rate: float = 3e-3
    norms: bool = True
    norm_rate: float = 1e-3
    rounding: bool = False
    rounding_rate: float = 1e-2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError(f"steps {self.steps} and batch_size {self.batch_size} must be at least 1.")
        if self.target not in get_args(Target):
            raise UserError(f"target {self.target!r} is unknown: choose logits or text.")

    @property
    def weight_bytes(self) -> int:  # noqa: D102
        return 6 * 4 if self.rounding else 0

    def build(self, codes: Mapping[str, QTensor], rest: Params, context: Context) -> Refinement:  # noqa: D102
        return Scales(codes, rest, context, self)
