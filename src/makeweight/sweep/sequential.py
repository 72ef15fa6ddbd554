"""Rounds a block linear by linear, each with the inputs that the linears rounded before it really give.

Shapes: N samples, B batch, T tokens, D hidden, I inputs of a linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from makeweight.methods.base import Context, Grid, RoundStep, State
from makeweight.numerics.qtensor import QTensor
from makeweight.sweep.block import Block


@torch.no_grad()
def round_in_order(
    block: Block,
    state: State,
    grid: Grid,
    step: RoundStep,
    context: Context,
    hidden_NTD: Tensor,
    *,
    batch_size: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, QTensor], dict[str, float]]:
    """Return final weights, codes, and what the step reports.

    `state` holds the weights as the grid receives them. Linears that read the same tensor are rounded together; those
    that come later see what they give.
    """
    weights = {name: weight.to(context.dtype) for name, weight in state.items()}
    codes: dict[str, QTensor] = {}
    report: dict[str, float] = {}
    for names in shared_inputs(block, hidden_NTD[:1].to(device)):
        hessian_II = _hessian(block, names[0], weights, hidden_NTD, batch_size=batch_size, device=device)
        for name in names:
            codes[name], said = step.codes(name, state[name], hessian_II, grid, context)
            weights[name] = codes[name].dequantize(context.dtype)
            report |= said
    return weights, {name: codes[name] for name in state}, report


def shared_inputs(block: Block, hidden_BTD: Tensor) -> list[list[str]]:
    """Return the linears in the order in which they are called, those that read the same tensor together."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, given: Tensor) -> None:
        for tensor, names in seen:
            if tensor is given:
                names.append(name)
                return
        seen.append((given, [name]))

    handles = [_on_input(block, name, lambda given, name=name: note(name, given)) for name in block.linears]
    try:
        block(hidden_BTD)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in seen]


def _hessian(
    block: Block, name: str, weights: State, hidden_NTD: Tensor, *, batch_size: int, device: torch.device
) -> Tensor:
    """Return X^T X over all samples of what enters a linear, (I, I) fp32, as a mean over tokens."""
    width = weights[name].shape[1]
    hessian_II = torch.zeros(width, width, device=device)

    def add(given: Tensor) -> None:
        rows = given.reshape(-1, width).float()
        hessian_II.addmm_(rows.T, rows)

    handle = _on_input(block, name, add)
    try:
        for part_BTD in hidden_NTD.split(batch_size):
            block(part_BTD.to(device), weights)
    finally:
        handle.remove()
    return hessian_II / (hidden_NTD.shape[0] * hidden_NTD.shape[1])


def _on_input(block: Block, name: str, act: Any) -> torch.utils.hooks.RemovableHandle:
    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        act(given[0])

    return block.module.get_submodule(name).register_forward_pre_hook(hook)
