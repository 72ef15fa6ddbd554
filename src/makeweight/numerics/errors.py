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
    return (error_BT / target.square().sum(-1).clamp_min(1e-12)).mean()
