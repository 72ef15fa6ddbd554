"""Reads GGUF files: where each tensor lies, and what its bytes stand for.

Block types that the `gguf` package decodes are decoded by it; the newest one, which it does not know, by a few lines of
our own, and so is the header, since the package opens no file in which that type occurs.
Sources: ggml `docs/gguf.md` (version 3), `src/ggml-quants.c`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F32, F16, BF16, Q2_0 = 0, 1, 30, 42
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
ALIGNMENT = 32
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as it lies in a file: block type, shape with the outputs first, bytes."""

    kind: int
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class _Cursor:
    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return int(value)

    def text(self) -> str:
        length = self.take("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.take("I"), self.take("Q")
            if inner in _SCALARS:
                self.at += count * _SCALARS[inner]
            else:
                for _ in range(count):
                    self.skip_value(inner)
        else:
            self.at += _SCALARS[kind]


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Return every tensor of a file by its name there, mapped from the disk; the alignment must be the usual one."""
    data = np.memmap(file, np.uint8, "r")
    cursor = _Cursor(data)
    magic, version = cursor.take("I"), cursor.take("I")
    assert magic == int.from_bytes(b"GGUF", "little") and version == 3, file
    count, keys = cursor.take("Q"), cursor.take("Q")
    for _ in range(keys):
        key = cursor.text()
        assert key != "general.alignment", file
        cursor.skip_value(cursor.take("I"))
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.take("I")
        shape = tuple(cursor.take("Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, cursor.take("I"), cursor.take("Q")))
    start = -(-cursor.at // ALIGNMENT) * ALIGNMENT
    return {
        name: Stored(kind=kind, shape=shape, data=data[start + offset : start + offset + _nbytes(kind, shape)])
        for name, shape, kind, offset in found
    }


def _nbytes(kind: int, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if kind in PLAIN:
        return size * PLAIN[kind].itemsize
    if kind == Q2_0:
        return size // 64 * 18
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return size // weights * nbytes


def decode(stored: Stored) -> Tensor:
    """Return a tensor's values: in its own dtype where it is not made of blocks, else in float32."""
    if stored.kind in PLAIN:
        return torch.from_numpy(np.array(stored.data)).view(PLAIN[stored.kind]).view(stored.shape)
    if stored.kind == Q2_0:
        return torch.from_numpy(_decode_q2_0(stored.data)).view(stored.shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.array(stored.data).reshape(math.prod(stored.shape[:-1]), -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType(stored.kind))).view(stored.shape)


def _decode_q2_0(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return 64 values for each 18 bytes: a float16 scale, then 2-bit codes in order, of which 1 stands for 0."""
    blocks = np.array(data).reshape(-1, 18)
    scale_N1 = blocks[:, :2].copy().view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
    return ((bits[:, ::2] + 2 * bits[:, 1::2] - 1) * scale_N1).ravel()
