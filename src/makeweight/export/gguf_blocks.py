"""Which of GGUF's blocks holds a scheme's codes, and how one is laid out.

A block is a run of weights along the inputs with one float16 scale d; a stored code q stands for (q + low) * d. Codes
of fewer bits fit into wider blocks unchanged, groups into smaller blocks by repeating their scale, and a group whose
range is the mirror image of a block's is stored negated under -d: all of it is exact. Only Q4_1, whose offset m is
a float16 too, rounds, namely -zero * scale.

Shapes: O outputs, I inputs, G groups per row, N blocks, S weights per block.
Sources: ggml `src/ggml-common.h` (layouts), llama.cpp pull request 24448 (Q2_0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from makeweight.export.base import Facts
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block type: its number in tensors (`kind`) and as the type of a file, its sizes, and the levels it can hold.

    With an `offset` a block stores the unsigned codes, and m beside d.
    """

    name: str
    kind: int
    file_type: int
    size: int
    nbytes: int
    low: int
    high: int
    offset: bool = False

    def holds(self, scheme: Scheme, zero: int) -> int:
        """Return 1 where codes less this zero-point lie in the range of levels, -1 where negated ones do, else 0."""
        if self.offset:
            return int(scheme.qmax - scheme.qmin <= self.high - self.low)
        least, most = scheme.qmin - zero, scheme.qmax - zero
        if least >= self.low and most <= self.high:
            return 1
        return -1 if -most >= self.low and -least <= self.high else 0


BLOCKS = (
    Block(name="Q2_0", kind=42, file_type=41, size=64, nbytes=18, low=-1, high=2),
    Block(name="Q3_K", kind=11, file_type=11, size=256, nbytes=110, low=-4, high=3),
    Block(name="Q4_0", kind=2, file_type=2, size=32, nbytes=18, low=-8, high=7),
    Block(name="Q4_1", kind=3, file_type=3, size=32, nbytes=20, low=0, high=15, offset=True),
    Block(name="Q5_0", kind=6, file_type=8, size=32, nbytes=22, low=-16, high=15),
    Block(name="Q8_0", kind=8, file_type=7, size=32, nbytes=34, low=-128, high=127),
)
"""From the fewest bytes per weight to the most."""
FP16_ROUNDING = 2.0**-11
"""Half the distance between neighbouring float16 values, relative to the larger."""


def block_for(facts: Facts) -> Block | str:
    """Return the smallest block that holds every code, or a clause on why none does and what would."""
    scheme = facts.scheme
    zeros = _zeros(facts)
    holding = [block for block in BLOCKS if all(block.holds(scheme, zero) for zero in zeros)]
    if not holding:
        return f"no block holds {scheme.bits}-bit asymmetric codes, Q8_0 holds symmetric ones and those of up to 7 bits"
    for block in holding:
        per_channel = scheme.group_size == -1
        if facts.misfit(inputs=block.size) is None and (per_channel or scheme.group_size % block.size == 0):
            return block
    if scheme.group_size == -1:
        return f"{facts.misfit(inputs=32)}, and a block is 32 weights of a row"
    return f"groups of {scheme.group_size} are not made of blocks of 32, groups of 32, 64 or 128 would be"


def rounding(facts: Facts) -> float:
    """Return how far a weight may lie off at most, in steps of its scale: 0 but for Q4_1."""
    block = block_for(facts)
    if isinstance(block, str) or not block.offset:
        return 0.0
    return (max(_zeros(facts)) - facts.scheme.qmin) * FP16_ROUNDING


def _zeros(facts: Facts) -> range:
    """Return the zero-points that may occur: all of them where the model is not solved yet."""
    if facts.scheme.symmetric:
        return range(1)
    least, most = facts.zeros or (facts.scheme.qmin, facts.scheme.qmax)
    return range(least, most + 1)


def pack(tensor: QTensor, block: Block) -> Bytes:
    """Return a linear's blocks (O, bytes per row)."""
    scheme = tensor.scheme
    outputs, width = tensor.codes_OI.shape
    scale_OG = tensor.scale_OG.float()
    groups = scale_OG.shape[1]
    zero_OG = torch.zeros(outputs, groups, dtype=torch.int8) if tensor.zero_OG is None else tensor.zero_OG
    codes_OGS = tensor.codes_OI.view(outputs, groups, -1).to(torch.int16)
    if block.offset:
        stored_OGS = codes_OGS - scheme.qmin
        heads_OGH = torch.stack([scale_OG, -(zero_OG.float() - scheme.qmin) * scale_OG], dim=-1)
    else:
        sign_of = [block.holds(scheme, zero) for zero in range(scheme.qmin, scheme.qmax + 1)]
        sign_OG = torch.tensor(sign_of, dtype=torch.int16)[zero_OG.long() - scheme.qmin]
        stored_OGS = (codes_OGS - zero_OG.to(torch.int16)[..., None]) * sign_OG[..., None] - block.low
        heads_OGH = (scale_OG * sign_OG)[..., None]
    heads_NH = heads_OGH.half().repeat_interleave(width // groups // block.size, dim=1).flatten(0, 1)
    head = heads_NH.numpy().astype("<f2").view(np.uint8)
    stored_NS = stored_OGS.to(torch.uint8).numpy().reshape(-1, block.size)
    blocks = _LAYOUTS[block.name](head, stored_NS)
    return np.ascontiguousarray(blocks).reshape(outputs, -1)


def _q2_0(head: Bytes, codes_NS: Bytes) -> Bytes:
    """Return d and bytes of four neighbours, the first lowest."""
    return np.hstack([head, _fold(codes_NS.reshape(len(codes_NS), 16, 4), 2)])


def _q3_k(head: Bytes, codes_NS: Bytes) -> Bytes:
    """Return highest bits, lower bits, sixteen sub-scales and d.

    Bit j of byte i of the first is that of weight 32 j + i; of the second, bits 2 j and 2 j + 1 of byte i of a half are
    of its weight 32 j + i. Every sub-scale is 33, which stands for 1: four lower bits each, then two higher ones.
    """
    count = len(codes_NS)
    highest = _fold((codes_NS >> 2).reshape(count, 8, 32).swapaxes(1, 2), 1)
    lower = _fold((codes_NS & 3).reshape(count, 2, 4, 32).swapaxes(2, 3), 2).reshape(count, 64)
    ones = np.array([[0x11] * 8 + [0xAA] * 4], np.uint8).repeat(count, 0)
    return np.hstack([highest, lower, ones, head])


def _nibbles(codes_NS: Bytes) -> Bytes:
    """Return bytes of the lowest four bits of two codes, half a block apart."""
    return _fold((codes_NS & 15).reshape(len(codes_NS), 2, 16).swapaxes(1, 2), 4)


def _q4(head: Bytes, codes_NS: Bytes) -> Bytes:
    return np.hstack([head, _nibbles(codes_NS)])


def _q5_0(head: Bytes, codes_NS: Bytes) -> Bytes:
    """Return d, the fifth bits in order, and the other four."""
    return np.hstack([head, _fold((codes_NS >> 4).reshape(len(codes_NS), 4, 8), 1), _nibbles(codes_NS)])


def _q8_0(head: Bytes, codes_NS: Bytes) -> Bytes:
    """Return d and the levels as signed bytes, for which the highest bit of code = level + 128 is turned over."""
    return np.hstack([head, codes_NS ^ np.uint8(128)])


def _fold(codes: NDArray[Any], bits: int) -> Bytes:
    """Return the last axis as one byte, its first entry in the lowest bits."""
    shifts = np.arange(codes.shape[-1], dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(codes << shifts, axis=-1).astype(np.uint8)


_LAYOUTS: Mapping[str, Callable[[Bytes, Bytes], Bytes]] = {
    "Q2_0": _q2_0,
    "Q3_K": _q3_k,
    "Q4_0": _q4,
    "Q4_1": _q4,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
}
