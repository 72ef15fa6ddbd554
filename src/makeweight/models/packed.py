"""Decodes linears stored in compressed-tensors' pack-quantized format back to ordinary weights.

O outputs, I inputs, G groups per row. value = (code - zero) * scale, computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from makeweight.errors import UserError

PACKED = ".weight_packed"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def declared_bits(quantization: Mapping[str, Any], folder: str) -> tuple[int, ...]:
    """Return the bit widths that `quantization_config` declares, or refuse a format that cannot be decoded."""
    method, layout = quantization.get("quant_method"), quantization.get("format")
    groups = quantization.get("config_groups") or {}
    layouts = {layout} if layout != "mixed-precision" else {group.get("format") for group in groups.values()}
    if method != "compressed-tensors" or layouts != {"pack-quantized"}:
        raise UserError(
            f"{folder} is already quantized ({method}, format {layout}): "
            "give an unquantized model, or one in compressed-tensors' pack-quantized format."
        )
    schemes = [group.get("weights") or {} for group in groups.values()]
    if any(scheme.get("type", "int") != "int" for scheme in schemes):
        raise UserError(f"{folder} holds packed weights that are not integers: give an unquantized model.")
    return tuple(sorted({int(scheme["num_bits"]) for scheme in schemes if "num_bits" in scheme}))


def decode(parts: Mapping[str, Tensor], bits: tuple[int, ...], name: str) -> Tensor:
    """Return the float32 weight [O, I] of the linear `name` from its stored `parts` (a subset of `PARTS`).

    The bit width is the one of `bits` that fits the packed width; a scheme's other facts show in the shapes:
    G from the scales, asymmetry from a stored zero-point. Raises `UserError` where nothing fits.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    missing = [part for part in ("weight_packed", "weight_scale", "weight_shape") if part not in parts]
    if missing:
        raise UserError(f"the packed linear {name} lacks its {missing[0]}: export the model again.")
    packed, scale_OG = parts["weight_packed"], parts["weight_scale"].float()
    height, width = (int(size) for size in parts["weight_shape"])
    fits = [count for count in bits if math.ceil(width * count / 32) == packed.shape[1]]
    if len(fits) != 1 or packed.shape[0] != height or scale_OG.ndim != 2:
        raise UserError(
            f"the packed linear {name} has {tuple(packed.shape)} words for {height} x {width} weights, "
            f"which is not the declared {' or '.join(map(str, bits))} bits: export the model again."
        )
    if scale_OG.shape[0] != height or width % scale_OG.shape[1]:
        raise UserError(f"the scales of the packed linear {name} do not fit its shape: export the model again.")
    codes_OI = unpack_from_int32(packed, fits[0], torch.Size((height, width))).float()
    groups = scale_OG.shape[1]
    group_I = parts.get("weight_g_idx", torch.arange(width) // (width // groups)).long()
    if "weight_zero_point" in parts:
        # Unpacked as rows: compressed-tensors 0.20 misreads a single packed row along dimension 0.
        zero_GO = parts["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
        zero_OG = unpack_from_int32(zero_GO, fits[0], torch.Size((groups, height))).T
        codes_OI = codes_OI - zero_OG.float()[:, group_I]
    return codes_OI * scale_OG[:, group_I]
