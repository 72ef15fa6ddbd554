"""A block-wise problem small enough for a test: a tiny model, its blocks, and the hidden states that enter them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from makeweight.calib.capture import capture
from makeweight.calib.stream import Stream
from makeweight.calib.walk import blocks_of
from makeweight.methods.base import Context, GridStep, MapStep, Params
from makeweight.methods.grid.clip import Lwc
from makeweight.numerics.scheme import Scheme
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Chain, Steps
from makeweight.sweep.fit import Fit
from makeweight.sweep.inputs import Moments
from makeweight.sweep.judge import Judge
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """The blocks of a frozen model, what enters the first, and how weights are to be stored."""

    blocks: tuple[Block, ...]
    hidden_NTD: Tensor
    context: Context

    def stream(self, batch_size: int = 4) -> Stream:
        return Stream(self.hidden_NTD.clone(), batch_size=batch_size, device=CPU)

    def chain(self, *steps: MapStep, grid: GridStep | None = None, index: int = 0) -> Chain:
        block = self.blocks[index]

        def inputs(params: Params) -> Moments:
            return Moments(block, params, self.hidden_NTD, 8, CPU)

        return Chain.build(block.state(), Steps(maps=steps, grid=grid or Lwc()), self.context, inputs=inputs)

    def judge(self, weights: tuple[float, ...] = (1.0,), index: int = 0) -> Judge:
        return Judge(blocks=self.blocks[index : index + len(weights)], weights=weights, device=CPU)

    def fit(self, chain: Chain, weights: tuple[float, ...] = (1.0,), **options: Any) -> Fit:
        """Prepare to learn block 0, judged after as many blocks as there are weights."""
        judge = self.judge(weights)
        targets = options.pop("targets", None) or self.stream().targets(judge.blocks)
        hidden = options.pop("hidden", self.hidden_NTD)
        options = {"steps": 24, "batch_size": 8, "checks": 4, "seed": 0} | options
        return Fit(chain, judge, hidden, targets, **options)

    def held_out_error(self, fit: Fit) -> float:
        """The loss of a fit's chain on the samples it did not learn from, computed anew."""
        index = fit.held_out
        with torch.no_grad():
            errors = fit.judge.errors(fit.chain(), fit.hidden[index], [t[index] for t in fit.targets])
            return fit.judge.loss(errors).item()


def problem(
    family: str = "llama",
    *,
    scheme: str = "W3A16g16",
    dtype: torch.dtype = torch.float32,
    samples: int = 16,
    tokens: int = 12,
    layers: int = 3,
) -> Problem:
    """Build one from a tiny random model and random tokens."""
    model = tiny_model(family, layers=layers, dtype=dtype).requires_grad_(False)
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.div_(3)  # or attention, as random as it is made, looks at one token only
    tokens_NT = torch.randint(0, 256, (samples, tokens), generator=torch.Generator().manual_seed(1))
    path = "model.decoder.layers" if family.startswith("opt") else "model.layers"
    captured = capture(model, path, tokens_NT, dtype=dtype)
    blocks = []
    for index, (module, kwargs) in enumerate(zip(blocks_of(model, path), captured.kwargs, strict=True)):
        linears = tuple(name for name, part in module.named_modules() if isinstance(part, nn.Linear))
        blocks.append(Block(index=index, module=module, linears=linears, kwargs=kwargs))
    scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    context = Context(scheme=Scheme.parse(scheme), scale_dtype=scale_dtype, dtype=dtype, steps=24)
    return Problem(tuple(blocks), captured.hidden_NTD, context)
