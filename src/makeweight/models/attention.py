"""The attention of a model that learns or writes: ours where it is faster, and transformers' own everywhere else.

In float32 ours is as fast as torch's for single samples of 2,048 tokens, and faster for shorter ones and more of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from makeweight.numerics.attention import causal_attention, last_token_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "makeweight_causal"
_FASTER = (torch.bfloat16, torch.float16, torch.float32)


def speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model` our attention where its class lets attention be replaced, and return it.

    For learning and writing only: what is measured is measured with transformers' own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)  # no mask where "causal" says it all
        model.set_attn_implementation(NAME)
    return model


def _attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Answer one attention layer: [B, T, H, E], and no probabilities."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = named.get("is_causal")
    answer = {key_BKTD.shape[2]: causal_attention, 1: last_token_attention}.get(query_BHTD.shape[2])
    if (
        answer is not None
        and attention_mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query_BHTD.device.type == "cpu"
        and query_BHTD.dtype in _FASTER
        and not any(named.get(name) for name in ("dropout", "softcap"))
        and not any(named.get(name) is not None for name in ("position_bias", "cache"))
    ):
        scale = named.get("scaling")
        scale = query_BHTD.shape[-1] ** -0.5 if scale is None else scale
        return answer(query_BHTD, key_BKTD, value_BKTE, scale).transpose(1, 2).contiguous(), None
    if query_BHTD.device.type != "cpu" and torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):  # others add up slopes in any order, and no run would end as another did
            return sdpa_attention_forward(module, query_BHTD, key_BKTD, value_BKTE, attention_mask, **named)
    return sdpa_attention_forward(module, query_BHTD, key_BKTD, value_BKTE, attention_mask, **named)
