"""What a weight may become: bits, grouping, symmetry and the dtype of its scales.

Torch is not imported here, so that a scheme can be read before anything heavy is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from makeweight.errors import UserError

ScaleDtype = Literal["auto", "bfloat16", "float16", "float32"]
MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 512)
"""Sizes worth proposing; any that divides a matrix's width is accepted."""
_PATTERN = re.compile(r"w(?P<bits>\d+)(?:a(?P<act>\d+))?(?:g(?P<group>-?\d+))?(?:_(?P<sym>sym|asym))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Integer weights of `bits` bits on a uniform grid, one scale per `group_size` inputs of a row.

    `group_size` -1 means one scale per output channel. A `scale_dtype` of "auto" gives scales the model's own dtype
    (float16 where that is float32); files hold their values no narrower than weights. `activations` 8 says that the
    runtime rounds what enters a linear to 8 bits, with a scale for every token: weights must then be 8-bit, symmetric
    and per channel, which kernels exist for.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: ScaleDtype = "auto"
    activations: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        for name in ("bits", "group_size"):
            if type(value := getattr(self, name)) is not int:
                raise UserError(f"{name}={value!r} is not a whole number.")
        if type(self.symmetric) is not bool:
            raise UserError(f"symmetric={self.symmetric!r} is neither true nor false.")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UserError(f"bits={self.bits} is not supported: choose {MIN_BITS} to {MAX_BITS}.")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(
                f"group size {self.group_size} is not possible: give 1 or more, or -1 for one scale per channel."
            )
        if self.scale_dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise UserError(f"scale dtype {self.scale_dtype!r} is unknown: choose auto, bfloat16, float16 or float32.")
        if self.activations not in (8, 16):
            raise UserError(f"{self.activations}-bit activations are not supported: choose 8 or 16.")
        if self.activations == 8 and (self.bits, self.group_size, self.symmetric) != (8, -1, True):
            raise UserError("8-bit activations need 8-bit symmetric weights with one scale per channel: write W8A8.")

    @classmethod
    def parse(cls, text: str, *, scale_dtype: ScaleDtype = "auto") -> Scheme:
        """Read the field's shorthand, in any case: `W4A16` (per channel), `W3A16g64`, `w2a16g64_sym`, `W8A8`."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise UserError(f"scheme {text!r} is not understood: write it like W3A16g64, W4A16 or W4A16g128_sym.")
        if match["act"] not in (None, "8", "16"):
            raise UserError(f"scheme {text!r} asks for {match['act']}-bit activations: only A16 and A8 are supported.")
        group = int(match["group"]) if match["group"] else -1
        return cls(
            bits=int(match["bits"]),
            group_size=group,
            symmetric=(match["sym"] or ("sym" if match["act"] == "8" else "")).lower() == "sym",
            scale_dtype=scale_dtype,
            activations=8 if match["act"] == "8" else 16,
        )

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        sym = "_sym" if self.symmetric and self.activations == 16 else ""
        return f"W{self.bits}A{self.activations}{group}{sym}"

    def words(self) -> str:
        """Say it in words: `W4A16` means groups of 128 to others."""
        group = "one scale per channel" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {group}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def qmin(self) -> int:
        """Smallest signed code."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest signed code."""
        return 2 ** (self.bits - 1) - 1

    def group_of(self, width: int, name: str) -> int:
        """Return how many inputs share a scale in a matrix with `width` inputs, or refuse with the sizes that fit."""
        if self.group_size == -1:
            return width
        if width % self.group_size:
            fits = [size for size in GROUP_SIZES if width % size == 0]
            raise UserError(
                f"group size {self.group_size} does not divide the {width} inputs of {name}: "
                f"use one of {', '.join(map(str, fits)) or 'none'}, or -1 for one scale per channel."
            )
        return self.group_size
