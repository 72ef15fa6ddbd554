"""Reads linears stored in compressed-tensors' integer formats: codes, scales, zero-points, or ordinary weights.

pack-quantized keeps words of packed codes, int-quantized one int8 per code.
O outputs, I inputs, G groups per row. value = (code - zero) * scale, computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from makeweight.errors import UserError

PACKED = ".weight_packed"
FORMATS = ("pack-quantized", "int-quantized")
STORED = ("weight_input", "weight_output")
"""Where compressed-tensors applies a transform before it stores; anywhere else its own runtime has to."""
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def declared_bits(quantization: Mapping[str, Any], folder: str) -> tuple[int, ...]:
    """Return the bit widths that `quantization_config` declares, or refuse a format that cannot be decoded."""
    method, layout = quantization.get("quant_method"), quantization.get("format")
    groups = quantization.get("config_groups") or {}
    layouts = {layout} if layout != "mixed-precision" else {group.get("format") for group in groups.values()}
    if method != "compressed-tensors" or len(layouts) != 1 or not layouts <= set(FORMATS):
        raise UserError(
            f"{folder} is already quantized ({method}{f', format {layout}' if layout else ''}): "
            f"give an unquantized model, or one in compressed-tensors' {' or '.join(FORMATS)} format."
        )
    if any(entry.get("location") not in STORED for entry in _transforms(quantization)):
        raise UserError(f"{folder} rotates what enters its linears as it runs: give the model that it was made from.")
    schemes = [group.get("weights") or {} for group in groups.values()]
    if any(scheme.get("type", "int") != "int" for scheme in schemes):
        raise UserError(f"{folder} holds packed weights that are not integers: give an unquantized model.")
    return tuple(sorted({int(scheme["num_bits"]) for scheme in schemes if "num_bits" in scheme}))


def _transforms(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield where transforms are applied; those of weights are in the stored weights already."""
    groups = (quantization.get("transform_config") or {}).get("config_groups") or {}
    yield from (entry for group in groups.values() for entry in group.get("apply") or ())


def declared_activations(quantization: Mapping[str, Any], folder: str) -> int:
    """Return the bits to which the runtime rounds what enters a packed linear; 16 where it does not.

    Raises UserError for any other way than one symmetric scale for each token, found as the model runs, and where
    outputs or the cache of keys and values are rounded as well.
    """
    groups = (quantization.get("config_groups") or {}).values()
    found = [given for group in groups if (given := group.get("input_activations"))]
    for given in found:
        grid = (given.get("type", "int"), given.get("symmetric", True), given.get("strategy"), given.get("dynamic"))
        if grid != ("int", True, "token", True):
            raise UserError(
                f"{folder} rounds activations otherwise than to integers with one symmetric scale for each token: "
                "give the model that it was made from."
            )
    if quantization.get("kv_cache_scheme") or any(group.get("output_activations") for group in groups):
        raise UserError(
            f"{folder} rounds outputs of its linears, or the cache of keys and values, as it runs: give the model that "
            "it was made from."
        )
    return min((int(given.get("num_bits", 8)) for given in found), default=16)


def decode(parts: Mapping[str, Tensor], bits: tuple[int, ...], name: str) -> Tensor:
    """Return the float32 weight [O, I] of the linear `name` from its stored `parts`; raises as `unpack` does."""
    codes_OI, scale_OG, zero_OG = unpack(parts, bits, name)
    width, groups = codes_OI.shape[1], scale_OG.shape[1]
    group_I = parts.get("weight_g_idx", torch.arange(width) // (width // groups)).long()
    centred_OI = codes_OI.float() if zero_OG is None else codes_OI.float() - zero_OG.float()[:, group_I]
    return centred_OI * scale_OG.float()[:, group_I]


def unpack(parts: Mapping[str, Tensor], bits: tuple[int, ...], name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes [O, I] int8, scales [O, G] as stored and zero-points [O, G] int8 (None: symmetric), both signed.

    The bit width is the one of `bits` that fits the packed width; a scheme's other facts show in the shapes:
    G from the scales, asymmetry from a stored zero-point. Raises `UserError` where nothing fits.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    plain = "weight" in parts
    needed = ("weight_scale",) if plain else ("weight_packed", "weight_scale", "weight_shape")
    missing = [part for part in needed if part not in parts]
    if missing:
        raise UserError(f"the packed linear {name} lacks its {missing[0]}: export the model again.")
    stored, scale_OG, width_bits = parts["weight" if plain else "weight_packed"], parts["weight_scale"], 8
    height, width = stored.shape if plain else (int(size) for size in parts["weight_shape"])
    if not plain:
        fits = [count for count in bits if math.ceil(width * count / 32) == stored.shape[1]]
        if len(fits) != 1 or stored.shape[0] != height:
            raise UserError(
                f"the packed linear {name} has {tuple(stored.shape)} words for {height} x {width} weights, "
                f"which is not the declared {' or '.join(map(str, bits))} bits: export the model again."
            )
        width_bits = fits[0]
    if scale_OG.ndim != 2 or scale_OG.shape[0] != height or width % scale_OG.shape[1]:
        raise UserError(f"the scales of the packed linear {name} do not fit its shape: export the model again.")
    if plain:
        return stored, scale_OG, parts.get("weight_zero_point")
    codes_OI = unpack_from_int32(stored, width_bits, torch.Size((height, width)))
    zero_OG = None
    if "weight_zero_point" in parts:
        # Unpacked as rows: compressed-tensors 0.20 misreads a single packed row along dimension 0.
        zero_GO = parts["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
        zero_OG = unpack_from_int32(zero_GO, width_bits, torch.Size((scale_OG.shape[1], height))).T.contiguous()
    return codes_OI, scale_OG, zero_OG


def linears(names: Iterable[str]) -> Iterator[str]:
    """Yield the linears that are stored packed or as int8, from all stored names."""
    held = set(names)
    for stored in sorted(held):
        linear, _, part = stored.rpartition(".")
        if part == "weight_scale" and (f"{linear}{PACKED}" in held or f"{linear}.weight" in held):
            yield linear
