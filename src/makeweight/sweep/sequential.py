"""Rounds a block linear by linear, each with the inputs that the linears rounded before it really give.

Shapes: N samples, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from makeweight.methods.base import Context, Grid, Params, RoundStep, State
from makeweight.numerics.qtensor import QTensor
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Frozen
from makeweight.sweep.inputs import Moments, shared_inputs


@torch.no_grad()
def round_in_order(
    block: Block,
    state: State,
    rest: Params,
    grid: Grid,
    step: RoundStep,
    context: Context,
    hidden_NTD: Tensor,
    *,
    batch_size: int,
    device: torch.device,
) -> Frozen:
    """Return final weights and codes, with what the step reports.

    `state` holds the weights as the grid receives them, `rest` the block's other parameters where a step may change
    them. Linears that read the same tensor are rounded together; those that come later see what they give.
    """
    weights = {name: tensor.to(context.dtype) for name, tensor in {**state, **rest}.items()}
    codes: dict[str, QTensor] = {}
    report: dict[str, float] = {}
    for names in shared_inputs(block, hidden_NTD[:1].to(device)):
        seen = Moments(block, weights, hidden_NTD, batch_size, device)
        seen.gather([names])
        for name in names:
            codes[name], said = step.codes(name, state[name], seen.moment(name), grid, context)
            weights[name] = codes[name].dequantize(context.dtype)
            report |= said
    return Frozen(
        weights={name: weights[name] for name in state},
        codes={name: codes[name] for name in state},
        rest=rest,
        report=report,
    )
