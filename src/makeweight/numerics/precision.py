"""Which dtype a device multiplies matrices in: a narrow one only where it has units for it; and rounding to one."""

from __future__ import annotations

import torch
from torch import Tensor


def fast_dtype(wanted: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return `wanted`, or float32 where the device would only emulate it.

    Most desktop processors have no units for bfloat16, and torch's products of it take them up to a hundred times as
    long as those of float32. The answer follows from what a processor can do, not from a measurement: on one kind of
    processor a run is always the same.
    """
    if wanted not in (torch.bfloat16, torch.float16) or _multiplies(wanted, torch.device(device)):
        return wanted
    return torch.float32


def named_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype of a name; "auto" is bfloat16 where the device has units for it."""
    return fast_dtype(torch.bfloat16, device) if name == "auto" else getattr(torch, name)


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether a device has units for products in `dtype`."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    taken = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    has_units = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if taken and has_units is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return bool(has_units())  # AVX-512 alone is enough for the library to take such products, and emulate them
    return taken


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as recipes write it."""
    return str(dtype).removeprefix("torch.")


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the values of a dtype, in the tensor's own; gradients pass."""
    return tensor + (tensor.to(dtype).to(tensor.dtype) - tensor).detach()
