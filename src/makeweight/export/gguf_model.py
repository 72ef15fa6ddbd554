"""A model in GGUF's terms: names of tensors, order of attention rows, and the keys that describe its architecture.

Shapes: H heads, D dimensions of a head.
Sources: ggml `docs/gguf.md` (keys); Su et al., RoFormer, section 3.4.2 (pairs of rotary dimensions).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from makeweight.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

ROPE_FREQS = "rope_freqs.weight"
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What llama.cpp calls an architecture, and whether it turns neighbouring dimensions rather than halves."""

    arch: str
    neighbours: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(arch="llama", neighbours=True),
    "MistralForCausalLM": Family(arch="llama", neighbours=True),
    "Qwen2ForCausalLM": Family(arch="qwen2"),
    "Qwen3ForCausalLM": Family(arch="qwen3"),
}


class Model:
    """One model's names, rows and keys, from its class and config.json."""

    def __init__(self, architecture: str, config: Mapping[str, Any]) -> None:
        from transformers import AutoConfig

        self.family = FAMILIES[architecture]
        values = {key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"}
        self.config: Any = AutoConfig.for_model(config["model_type"], **values)

    @property
    def rows(self) -> int:
        """How many tokens the embedding has."""
        return self.config.vocab_size

    @property
    def head_size(self) -> int:
        """D."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def rope(self) -> str:
        """How frequencies of rotary positions are made, in Hugging Face's word."""
        return self.config.rope_parameters.get("rope_type", "default")

    def refusal(self) -> str | None:
        """Return what llama.cpp would compute otherwise, as a clause, or None where it computes the same."""
        known = ("default", "linear", "llama3") if self.family.arch == "llama" else ("default", "linear")
        if self.rope not in known:
            return f"its rotary positions are of type {self.rope}, {', '.join(known)} are supported"
        if self.config.rope_parameters.get("partial_rotary_factor", 1) != 1:
            return "its rotary positions turn only a part of each head"
        if self.config.hidden_act not in ("silu", "swish"):
            return f"its activation is {self.config.hidden_act}, llama.cpp computes silu"
        return None

    @cached_property
    def _map(self) -> Any:
        from gguf import MODEL_ARCH, get_tensor_name_map

        return get_tensor_name_map(MODEL_ARCH[self.family.arch.upper()], self.config.num_hidden_layers)

    def name(self, tensor: str) -> str | None:
        """Return a tensor's name in GGUF, None where it has none there."""
        return self._map.get_name(tensor, try_suffixes=_SUFFIXES)

    def _heads(self, tensor: str) -> int | None:
        """Return how many heads' rows a tensor has to give in another order, None where the order stays."""
        module = tensor.removesuffix(".weight").removesuffix(".bias")
        if not self.family.neighbours or not module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            return None
        return self.config.num_attention_heads if module.endswith("q_proj") else self.config.num_key_value_heads

    def reorder(self, name: str, tensor: Tensor) -> Tensor:
        """Return rows so that the two dimensions that turn together, D / 2 apart in ours, are neighbours."""
        heads = self._heads(name)
        if heads is None:
            return tensor
        rows = torch.arange(len(tensor)).view(heads, 2, -1).transpose(1, 2).flatten()
        return tensor[rows]

    def reorder_codes(self, name: str, tensor: QTensor) -> QTensor:
        """Return a linear with its rows of codes, scales and zero-points in the order of `reorder`."""
        if self._heads(name) is None:
            return tensor
        return QTensor(
            codes_OI=self.reorder(name, tensor.codes_OI),
            scale_OG=self.reorder(name, tensor.scale_OG),
            zero_OG=None if tensor.zero_OG is None else self.reorder(name, tensor.zero_OG),
            scheme=tensor.scheme,
        )

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """Return rows in the model's own order: of each head, even ones first and then odd ones."""
        heads = self._heads(name)
        if heads is None:
            return tensor
        split = tensor.unflatten(0, (heads, -1))
        return torch.cat([split[:, 0::2], split[:, 1::2]], dim=1).flatten(0, 1)

    def rope_factors(self) -> Tensor | None:
        """Return by what each frequency is divided [D / 2], where llama.cpp has no keys to work it out from."""
        if self.rope != "llama3":
            return None
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        powers = torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size
        return self.config.rope_parameters["rope_theta"] ** -powers / scaled

    def describe(self, writer: GGUFWriter) -> None:
        """Write the keys of the architecture."""
        from gguf import RopeScalingType

        # Beyond its window a model attends to less, which llama.cpp leaves out for these families.
        window = getattr(self.config, "sliding_window", None) or self.config.max_position_embeddings
        writer.add_context_length(min(window, self.config.max_position_embeddings))
        writer.add_embedding_length(self.config.hidden_size)
        writer.add_block_count(self.config.num_hidden_layers)
        writer.add_feed_forward_length(self.config.intermediate_size)
        writer.add_head_count(self.config.num_attention_heads)
        writer.add_head_count_kv(self.config.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(self.config.rms_norm_eps)
        writer.add_vocab_size(self.config.vocab_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(self.config.rope_parameters["rope_theta"])
        if self.rope == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.config.rope_parameters["factor"])
