"""How the loss of a block bends along its weights: what moving a single weight costs to second order.

This is the diagonal of the Gauss-Newton matrix. The slope of outputs with random signs, each weighed by the root of the
loss's own curvature there, has that diagonal as its mean square; a few backward passes show it well enough, since of
every matrix only the means of its rows and columns are kept.
Source: arXiv 1206.6464 (curvature propagation). Keeping a product of a column and a row is ours, after Adafactor.

Shapes: N samples, B batch, T tokens, D hidden, O out, I in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from makeweight.numerics.errors import bend_of_error
from makeweight.numerics.flips import Curvature
from makeweight.sweep.judge import Judge

PROBES = 8
TINY = 1e-30


def curvature(
    judge: Judge,
    weights: Mapping[str, Tensor],
    hidden_NTD: Tensor,
    targets: Sequence[Tensor],
    batches: Sequence[Tensor],
    seed: int,
) -> dict[str, Curvature]:
    """Return the curvature of a judge's loss along every linear, with one probe for each batch of samples.

    `weights` is what the block runs with, quantized, by name; those that are no linear's stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in weights if name in judge.blocks[0].linears]
    held = {name: tensor.detach().requires_grad_(name in names) for name, tensor in weights.items()}
    columns = {name: weights[name].new_zeros(len(weights[name]), 1, dtype=torch.float32) for name in names}
    rows = {name: weights[name].new_zeros(weights[name].shape[1], dtype=torch.float32) for name in names}
    for index in batches:
        outputs = judge.outputs(held, hidden_NTD[index].to(judge.device))
        signed = [
            _signed(output, target[index].to(judge.device), share, generator)
            for output, target, share in zip(outputs, targets, judge.shares, strict=True)
        ]
        slopes = torch.autograd.grad(torch.stack(signed).sum(), [held[name] for name in names], allow_unused=True)
        for name, slope_OI in zip(names, slopes, strict=True):
            if slope_OI is not None:  # no token of the batch may have met it
                square_OI = slope_OI.float().square()
                columns[name] += square_OI.mean(1, keepdim=True) / len(batches)
                rows[name] += square_OI.mean(0) / len(batches)
    return {name: (columns[name] / rows[name].mean().clamp_min(TINY), rows[name]) for name in names}


def _signed(output_BTD: Tensor, target_BTD: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return the sum of outputs, each with a random sign and the root of the loss's curvature there."""
    signs = torch.randint(2, output_BTD.shape, generator=generator).mul_(2).sub_(1).to(output_BTD.device)
    return (output_BTD.float() * signs * (share * bend_of_error(target_BTD)).sqrt()).sum()
