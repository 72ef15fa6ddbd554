"""A quantized matrix: integer codes, their scales and zero-points."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from makeweight.numerics.grid import from_codes, grouped
from makeweight.numerics.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class QTensor:
    """Codes (O, I) int8 and zero-points (O, G) int8, both signed, and scales (O, G) in their stored dtype.

    `zero_OG` is None on a symmetric grid. The matrix they stand for is (code - zero) * scale.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (O, I), computed in fp32 (exact before its one rounding to `dtype`)."""
        scale_OG = self.scale_OG.float()
        zero_OG = torch.zeros_like(scale_OG) if self.zero_OG is None else self.zero_OG.float()
        group = self.codes_OI.shape[1] // scale_OG.shape[1]
        return from_codes(grouped(self.codes_OI.float(), group), scale_OG, zero_OG).flatten(1).to(dtype)

    def to(self, device: torch.device) -> QTensor:
        """Return it on a device."""
        zero_OG = None if self.zero_OG is None else self.zero_OG.to(device)
        return replace(self, codes_OI=self.codes_OI.to(device), scale_OG=self.scale_OG.to(device), zero_OG=zero_OG)

    def digest(self) -> str:
        """Return a SHA-256 over codes, zero-points and scales: equal digests mean equal matrices."""
        parts = [self.codes_OI, self.scale_OG, *([] if self.zero_OG is None else [self.zero_OG])]
        sha = hashlib.sha256(str(self.scheme).encode())
        for part in parts:
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def bits_per_weight(self) -> float:
        """Return stored bits per weight: codes, scales and packed zero-points."""
        scales = self.scale_OG.numel() * self.scale_OG.element_size() * 8
        zeros = 0 if self.zero_OG is None else self.zero_OG.numel() * self.scheme.bits
        return self.scheme.bits + (scales + zeros) / self.codes_OI.numel()
