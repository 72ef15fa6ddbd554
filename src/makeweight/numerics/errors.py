"""How far one set of hidden states is from another.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_error(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean over tokens of r = ||output - target||^2 / ||target||^2, of 1 + log r where r > 1, fp32 scalar.

    Every token is measured against its own size: the few tokens that carry massive activations (hundreds of times
    the usual size from the middle layers on, arXiv 2402.17762) count as tokens, not as the whole sum. The norm that
    follows in the network rescales tokens in the same way.
    At few bits a token may get massive activations that it does not have in the original: its r is in the thousands,
    and three such tokens of 65,000 had half of the loss, in every block from there on (LOG.md). By the logarithm one
    that is lost pulls less than others, and where all are lost, there is still a slope.
    """
    target = target_BTD.float()
    error_BT = (output_BTD.float() - target).square().sum(-1)
    ratio_BT = error_BT / _energy(target)
    return torch.where(ratio_BT > 1, 1 + ratio_BT.clamp(min=1).log(), ratio_BT).mean()


def bend_of_error(target_BTD: Tensor) -> Tensor:
    """Return the second derivative of `token_error`, of r, along any entry of a token's output, (B, T, 1), fp32."""
    energy_BT = _energy(target_BTD.float())
    return (2 / (energy_BT * energy_BT.numel())).unsqueeze(-1)


def _energy(target_BTD: Tensor) -> Tensor:
    return target_BTD.square().sum(-1).clamp_min(1e-12)
