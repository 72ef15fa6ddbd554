"""The GPTQ format: codes down the columns of int32 words, in version 2, as auto-round names it, and in version 1.

32 codes take exactly as many words as a code has bits, low bits first; 3-bit codes straddle words. Version 2 stores
zero-points as they are. Version 1 stores them less one and its kernels add one again, so that a zero-point of 0 wraps
around and comes back as 2**bits; that of a symmetric grid, 2**(bits - 1), is always safe.

Shapes: O out, I in, G groups per row, N packed along, W words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from makeweight import __version__
from makeweight.export.base import Facts
from makeweight.export.hf import HfFormat, json_text, left_alone
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

if TYPE_CHECKING:
    from makeweight.export.solved import Solved

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
SMALLEST_GROUP = 16
"""Kernels take groups of so many inputs, or multiples."""


def integer_clause(scheme: Scheme, fp16_scales: bool) -> str | None:
    """Return why neither GPTQ nor AWQ can hold such numbers, None where they can."""
    if scheme.activations == 8:
        return "it holds weights for 16-bit activations: choose compressed-tensors for W8A8"
    if scheme.group_size != -1 and scheme.group_size % SMALLEST_GROUP:
        return f"its kernels take groups of a multiple of {SMALLEST_GROUP} inputs, not {scheme.group_size}"
    if not fp16_scales:
        return "it stores scales in float16, which some of these are no values of: quantize with --scale-dtype float16"
    return None


def unsigned(signed: Tensor, bits: int) -> Tensor:
    """Return signed codes or zero-points counted from 0, as uint8."""
    return (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def unsigned_zeros(tensor: QTensor) -> Tensor:
    """Return zero-points (O, G) counted from 0, as uint8; the middle of the range on a symmetric grid."""
    signed_OG = torch.zeros_like(tensor.scale_OG, dtype=torch.int8) if tensor.zero_OG is None else tensor.zero_OG
    return unsigned(signed_OG, tensor.scheme.bits)


def to_words(values_NO: Tensor, bits: int) -> Tensor:
    """Pack each column into int32 words (W, O), low bits first; N must be a multiple of 32."""
    words_WO = torch.zeros(values_NO.shape[0] * bits // 32, values_NO.shape[1], dtype=torch.int32)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        here = values_NO[place::32].to(torch.int32)
        words_WO[word::bits] |= here << shift
        if shift + bits > 32:
            words_WO[word + 1 :: bits] |= here >> (32 - shift)
    return words_WO


def from_words(words: Tensor, bits: int) -> Tensor:
    """Read each row of int32 words as one stream of bits, lowest first, and return its integers, (rows, N) uint8.

    What is left of the last word, too short for another integer, does not count.
    """
    octets = words.contiguous().numpy().astype("<i4").view(np.uint8)
    count = 8 * octets.shape[1] // bits
    stream = np.unpackbits(octets, axis=1, bitorder="little", count=count * bits).reshape(len(octets), count, bits)
    return torch.from_numpy(stream @ (1 << np.arange(bits, dtype=np.uint8)))


def pack(tensor: QTensor, less: int) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear, with `less` taken from every zero-point, modulo the width."""
    bits, (_, width) = tensor.scheme.bits, tensor.codes_OI.shape
    zero_OG = (unsigned_zeros(tensor) - less) & (2**bits - 1)  # uint8 wraps as the format does
    group = width // tensor.scale_OG.shape[1]
    return {
        "qweight": to_words(unsigned(tensor.codes_OI, bits).T, bits),
        "qzeros": to_words(zero_OG, bits).T.contiguous(),
        "scales": tensor.scale_OG.T.half().contiguous(),
        "g_idx": (torch.arange(width) // group).to(torch.int32),
    }


def unpack(stored: Mapping[str, Tensor], bits: int, less: int) -> Tensor:
    """Return the weight (O, I) in float32, with `less` added to the stored zero-points as kernels do: unwrapped."""
    group_I = stored["g_idx"].long()
    code_OI = from_words(stored["qweight"].T, bits).float()
    zero_OG = from_words(stored["qzeros"], bits).T.float() + less
    return (code_OI - zero_OG[:, group_I]) * stored["scales"].T.float()[:, group_I]


class Gptq(HfFormat):
    """Version 2: zero-points as they are."""

    name = "gptq"
    parts = PARTS
    less: ClassVar[int] = 0
    """What is taken from a zero-point before it is stored."""

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        if facts.scheme.symmetric and facts.scheme.bits == 4:
            return ("vLLM 0.32, CPU too", "GPTQModel")
        return ("GPTQModel", "vLLM on a GPU since pull request 26092, with --dtype float16; not 0.32 on a CPU")

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        if facts.scheme.bits not in BITS:
            return f"it holds {', '.join(map(str, BITS[:-1]))} and {BITS[-1]} bits, not {facts.scheme.bits}"
        return integer_clause(facts.scheme, facts.fp16_scales) or facts.misfit(inputs=32, outputs=32)

    def pack(self, tensor: QTensor, solved: Solved) -> dict[str, Tensor]:  # noqa: D102
        return pack(tensor, self.less)

    def unpack(self, stored: Mapping[str, Tensor], solved: Solved) -> Tensor:  # noqa: D102
        return unpack(stored, solved.scheme.bits, self.less)

    def quantization_config(self, solved: Solved) -> dict[str, Any]:  # noqa: D102
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": solved.scheme.bits,
            "group_size": solved.scheme.group_size,
            "sym": solved.scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"makeweight:{__version__}"]},
        }
        if rules := {rf"-:^{re.escape(name)}(\.|$)": {} for name in left_alone(solved)}:
            config["dynamic"] = rules
        return config

    def side_texts(self, solved: Solved) -> dict[str, str]:  # noqa: D102
        return {"quantize_config.json": json_text(self.quantization_config(solved))}


class GptqV1(Gptq):
    """Version 1: zero-points less one."""

    name = "gptq-v1"
    less = 1

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        if not facts.scheme.symmetric:
            return ("runtimes that add 1 to zero-points; GPTQModel and auto-round refuse it where it is asymmetric",)
        vllm = ("vLLM 0.32, CPU too" if facts.scheme.bits == 4 else "vLLM on a GPU",)
        return (*vllm, "SGLang", "GPTQModel", "transformers 5 with auto-round 0.16, CPU too")

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        safe = facts.scheme.symmetric or (facts.zeros is not None and facts.zeros[0] > facts.scheme.qmin)
        wraps = (
            "a zero-point of 0, which an asymmetric grid may have, wraps around: choose gptq, or quantize with --sym"
        )
        return super().refusal(facts) or (None if safe else wraps)

    def quantization_config(self, solved: Solved) -> dict[str, Any]:  # noqa: D102
        config = {**super().quantization_config(solved), "checkpoint_format": "gptq"}
        del config["meta"]  # transformers 5 takes its presence for version 2, and will not give the model to auto-round
        return config


class AutoRound(Gptq):
    """The tensors of version 2 under auto-round's name for them, by which transformers finds its kernels."""

    name = "auto-round"

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        return ("transformers 5 with auto-round 0.16, CPU too",)

    def quantization_config(self, solved: Solved) -> dict[str, Any]:  # noqa: D102
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round",
            "bits": solved.scheme.bits,
            "group_size": solved.scheme.group_size,
            "sym": solved.scheme.symmetric,
            "extra_config": {name: {"bits": 16} for name in solved.ignore if name != "lm_head"},
        }

    def side_texts(self, solved: Solved) -> dict[str, str]:  # noqa: D102
        return {}
