"""The compressed-tensors formats `pack-quantized` (weights only) and `int-quantized` (W8A8).

Packed, codes of a row lie along its inputs in int32 words, low bits first and without padding, and zero-points along
the outputs. Widths other than 4 and 8 bits need compressed-tensors 0.18 or later, where this dense layout is the only
one. With 8-bit activations codes are stored as int8, and the runtime rounds what enters a linear, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from makeweight.export.base import Facts
from makeweight.export.gptq import from_words
from makeweight.export.hf import HfFormat
from makeweight.models import packed
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

if TYPE_CHECKING:
    from makeweight.export.solved import Solved

TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
VERSION = "0.18.0"
"""The oldest compressed-tensors that reads these files at every width."""


def widened(tensor: QTensor, dtype: torch.dtype) -> QTensor:
    """Return a matrix as it is stored in a model of `dtype`, with scales that are no narrower than its weights.

    Runtimes multiply in the dtype of the scales: where that were a narrower one, or another of the same width, they
    would round every weight once more than was solved.
    """
    return replace(tensor, scale_OG=tensor.scale_OG.to(torch.promote_types(tensor.scale_OG.dtype, dtype)))


def pack(name: str, tensor: QTensor) -> dict[str, Tensor]:
    """Return the tensors that replace `name`.weight in a file."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = tensor.scheme.bits
    if tensor.scheme.activations == 8:
        return {f"{name}.weight": tensor.codes_OI, f"{name}.weight_scale": tensor.scale_OG}
    parts = {
        f"{name}.weight_packed": pack_to_int32(tensor.codes_OI, bits),
        f"{name}.weight_scale": tensor.scale_OG,
        f"{name}.weight_shape": torch.tensor(tensor.codes_OI.shape, dtype=torch.int64),
    }
    if tensor.zero_OG is not None:
        parts[f"{name}.weight_zero_point"] = pack_to_int32(tensor.zero_OG, bits, packed_dim=0).contiguous()
    return parts


def unpack(parts: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return the weight (O, I), float32, that stored tensors stand for, read by their layout and not by who packed."""
    scale_OG = parts["weight_scale"].float()
    height, width = (int(size) for size in parts["weight_shape"]) if "weight_shape" in parts else parts["weight"].shape
    group_I = torch.arange(width) // (width // scale_OG.shape[1])
    code_OI = parts["weight"].float() if "weight" in parts else _signed(parts["weight_packed"], bits, width)
    if "weight_zero_point" in parts:
        code_OI -= _signed(parts["weight_zero_point"].T, bits, height).T[:, group_I]
    return code_OI * scale_OG[:, group_I]


def _signed(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers of each row of words, counted from the middle of their range, float32."""
    return from_words(words, bits)[:, :count].float() - 2 ** (bits - 1)


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`; `ignore` names the linears that stay as they were."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "memoryless_minmax",
    }
    layout = "int-quantized" if scheme.activations == 8 else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": TOKENS if scheme.activations == 8 else None,
        "output_activations": None,
        "format": layout,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "version": VERSION,
    }
    if scheme.activations == 16:
        # transformers would otherwise keep linears packed, for which compressed-tensors 0.20 expects zero-points that
        # are not; unpacked at loading, every scheme arrives bit for bit. Other runtimes ignore this key.
        config["dequantize"] = True
    return config


class CompressedTensors(HfFormat):
    """The format of the solved folder itself, in fewer shards."""

    name = "compressed-tensors"
    rounds_activations = True
    parts = tuple(part for part in packed.PARTS if part != "weight_g_idx")

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        scheme = facts.scheme
        if scheme.bits == 4 or scheme.activations == 8:
            vllm = "vLLM 0.32, CPU too"
        else:
            vllm = f"vLLM where its GPU kernels take {scheme.bits} bits; 0.32 has none for a CPU"
        return ("transformers 5.6 with compressed-tensors 0.20", vllm)

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        return None

    def pack(self, tensor: QTensor, solved: Solved) -> dict[str, Tensor]:  # noqa: D102
        return {name.removeprefix("."): part for name, part in pack("", tensor).items()}

    def unpack(self, stored: Mapping[str, Tensor], solved: Solved) -> Tensor:  # noqa: D102
        return unpack(stored, solved.scheme.bits)

    def quantization_config(self, solved: Solved) -> dict[str, Any]:  # noqa: D102
        return quantization_config(solved.scheme, solved.ignore)
