"""Rotary positions of GGUF files: transformers leaves out how they are scaled, and of some families their base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gguf import GGUFReader

FREQS = "rope_freqs.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Llama 3.1, 3.2 and 3.3 share; only their factor differs, and it divides the lowest frequencies."""


class UnknownScaling(Exception):
    """A scaling that no configuration of transformers is known for; its text names what says so."""


def rope_parameters(reader: GGUFReader) -> dict[str, Any]:
    """Return what a file says of its positions, as `rope_parameters` has it: theta where it is given, and the scaling.

    Raises UnknownScaling.
    """
    base = _field(reader, ".rope.freq_base")
    return {**_scaling(reader), **({} if base is None else {"rope_theta": float(base)})}


def _scaling(reader: GGUFReader) -> dict[str, Any]:
    """Return how positions are scaled, nothing for plain ones.

    Llama 3's formula is not in a file, only what it gives: it is recognised by its numbers.
    """
    factors = {item.name: item.data for item in reader.tensors if item.name.startswith("rope_f")}
    if others := sorted(factors.keys() - {FREQS}):
        raise UnknownScaling(others[0])
    if FREQS in factors:
        return _llama3(torch.tensor(factors[FREQS]).float(), _field(reader, ".rope.freq_base") or 10000.0)
    kind = _field(reader, ".rope.scaling.type") or "none"
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(_field(reader, ".rope.scaling.factor") or 1.0)}
    if kind != "none":
        raise UnknownScaling(f"rope.scaling.type {kind}")
    return {}


def _field(reader: GGUFReader, ending: str) -> Any:
    return next((field.contents() for name, field in reader.fields.items() if name.endswith(ending)), None)


def _llama3(divisors_F: torch.Tensor, theta: float) -> dict[str, Any]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor = round(float(divisors_F.max()), 4)
    if factor == 1.0:
        return {}
    size = 2 * len(divisors_F)
    found = {**LLAMA3, "factor": factor}
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, rope_parameters={**found, "rope_theta": theta})
    scaled_F, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain_F = theta ** -(torch.arange(0, size, 2) / size)
    if not torch.allclose(plain_F / scaled_F, divisors_F, rtol=1e-3):
        raise UnknownScaling(FREQS)
    return found
