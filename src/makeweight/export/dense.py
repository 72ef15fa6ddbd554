"""Ordinary weights at the values of the grid, in the model's own dtype: as large as the original, loads everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from makeweight.export.base import Facts
from makeweight.export.hf import HfFormat
from makeweight.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from makeweight.export.solved import Solved


class Dense(HfFormat):
    """A folder like the original's."""

    name = "dense"
    parts = ("weight",)

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        return ("everything that loads the original",)

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        return None

    def pack(self, tensor: QTensor, solved: Solved) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": tensor.dequantize(solved.dtype)}

    def unpack(self, stored: Mapping[str, Tensor], solved: Solved) -> Tensor:  # noqa: D102
        return stored["weight"]

    def quantization_config(self, solved: Solved) -> dict[str, Any] | None:  # noqa: D102
        return None
