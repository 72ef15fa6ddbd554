"""The compressed-tensors `pack-quantized` format, which vLLM and transformers load.

Codes of a row are packed along its inputs into int32 words, low bits first and without padding; zero-points are
packed along the outputs. Widths other than 4 and 8 bits need compressed-tensors 0.18 or later, where this dense
layout is the only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

VERSION = "0.18.0"
"""The oldest compressed-tensors that reads these files at every width."""


def pack(name: str, tensor: QTensor) -> dict[str, Tensor]:
    """Return the tensors that replace `name`.weight in a file."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = tensor.scheme.bits
    parts = {
        f"{name}.weight_packed": pack_to_int32(tensor.codes_OI, bits),
        f"{name}.weight_scale": tensor.scale_OG,
        f"{name}.weight_shape": torch.tensor(tensor.codes_OI.shape, dtype=torch.int64),
    }
    if tensor.zero_OG is not None:
        parts[f"{name}.weight_zero_point"] = pack_to_int32(tensor.zero_OG, bits, packed_dim=0).contiguous()
    return parts


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
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        # transformers would otherwise keep linears packed, for which compressed-tensors 0.20 expects zero-points that
        # are not; unpacked at loading, every scheme arrives bit for bit. Other runtimes ignore this key.
        "dequantize": True,
        "version": VERSION,
    }
