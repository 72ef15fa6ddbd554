"""The AWQ format in its GEMM layout: 4 bits, eight neighbouring outputs in an int32 word, in an order of its own.

Shapes: O out, I in, G groups per row, W words per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from makeweight.export.base import Facts
from makeweight.export.gptq import integer_clause, unsigned, unsigned_zeros
from makeweight.export.hf import HfFormat, left_alone
from makeweight.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from makeweight.export.solved import Solved

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in each nibble of a word, lowest first."""
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which nibble of a word each of eight outputs lies."""


def to_words(values_NO: Tensor) -> Tensor:
    """Pack integers of 0 to 15 along the outputs into int32 words (N, W)."""
    parts_NW8 = values_NO.unflatten(1, (-1, 8)).to(torch.int32)
    words_NW = torch.zeros(parts_NW8.shape[:2], dtype=torch.int32)
    for nibble, output in enumerate(ORDER):
        words_NW |= parts_NW8[..., output] << 4 * nibble
    return words_NW


def from_words(words_NW: Tensor) -> Tensor:
    """Read the integers (N, O) of words, byte by byte: two nibbles each, put back into the order of the outputs."""
    octets = torch.from_numpy(words_NW.contiguous().numpy().astype("<i4").view("u1"))
    nibbles_NW8 = torch.stack((octets % 16, octets // 16), dim=-1).reshape(*words_NW.shape, 8)
    return nibbles_NW8[..., list(INVERSE)].flatten(1)


def pack(tensor: QTensor) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear."""
    return {
        "qweight": to_words(unsigned(tensor.codes_OI, BITS).T),
        "qzeros": to_words(unsigned_zeros(tensor).T),
        "scales": tensor.scale_OG.T.half().contiguous(),
    }


def unpack(stored: Mapping[str, Tensor]) -> Tensor:
    """Return the weight (O, I) in float32."""
    code_IO, zero_GO = (from_words(stored[part]).float() for part in ("qweight", "qzeros"))
    group_I = torch.arange(len(code_IO)) // (len(code_IO) // len(zero_GO))
    return ((code_IO - zero_GO[group_I]) * stored["scales"].float()[group_I]).T


class Awq(HfFormat):
    """Version "gemm", with zero-points; on a symmetric grid they are all 8."""

    name = "awq"
    parts = ("qweight", "qzeros", "scales")

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        return ("vLLM 0.32, x86 CPU too", "SGLang", "OpenVINO", "transformers 5 with auto-round 0.16 and its -lib")

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        if facts.scheme.bits != BITS:
            return f"it holds {BITS} bits, not {facts.scheme.bits}"
        return integer_clause(facts.scheme, facts.fp16_scales) or facts.misfit(outputs=8)

    def pack(self, tensor: QTensor, solved: Solved) -> dict[str, Tensor]:  # noqa: D102
        return pack(tensor)

    def unpack(self, stored: Mapping[str, Tensor], solved: Solved) -> Tensor:  # noqa: D102
        return unpack(stored)

    def quantization_config(self, solved: Solved) -> dict[str, Any]:  # noqa: D102
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": solved.scheme.group_size,
            "zero_point": True,
            "sym": False,  # the same for auto-round, which knows no zero_point and would pass over the zeros
            "modules_to_not_convert": left_alone(solved) or None,
        }
