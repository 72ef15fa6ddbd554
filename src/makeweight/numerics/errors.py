"""How far one set of hidden states is from another.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor


def token_error(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean over tokens of ||output - target||^2 / ||target||^2, a scalar in fp32.

    Every token is measured against its own size: the few tokens that carry massive activations (hundreds of times
    the usual size from the middle layers on, arXiv 2402.17762) count as tokens, not as the whole sum. The norm that
    follows in the network rescales tokens in the same way.
    """
    target = target_BTD.float()
    error_BT = (output_BTD.float() - target).square().sum(-1)
    return (error_BT / _energy(target)).mean()


def bend_of_error(target_BTD: Tensor) -> Tensor:
    """Return the second derivative of `token_error` along any entry of a token's output, shape (B, T, 1), fp32."""
    energy_BT = _energy(target_BTD.float())
    return (2 / (energy_BT * energy_BT.numel())).unsqueeze(-1)


def _energy(target_BTD: Tensor) -> Tensor:
    return target_BTD.square().sum(-1).clamp_min(1e-12)
