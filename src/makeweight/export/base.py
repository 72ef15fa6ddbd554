"""What a format is: whether it can hold a model, how it writes one, and what it reads back.

Codes go out unchanged; a format lays them out and never rounds a weight again. What a written file stands for is
decoded by another path than the one that packed it, and compared with the solved codes.

Shapes: O out, I in, G groups per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

if TYPE_CHECKING:
    from makeweight.export.solved import Solved


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides whether a format can hold a model; the fields with defaults are known once it is solved.

    `shapes` are (O, I) of the quantized linears by full name, `zeros` the smallest and largest signed zero-point,
    `fp16_scales` whether every scale is a float16 value, `architecture` the class that config.json names, `folder`
    where the tokenizer lies, `kept` the full names of the tensors that stay as they are (before solving, of those
    outside the blocks).
    """

    scheme: Scheme
    architecture: str
    shapes: Mapping[str, tuple[int, int]]
    zeros: tuple[int, int] | None = None
    fp16_scales: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], **known: Any) -> Facts:
        """Build from config.json, which names the architecture, and the other fields."""
        return cls(architecture=(config.get("architectures") or ["unknown"])[0], config=config, **known)

    def misfit(self, *, inputs: int = 1, outputs: int = 1) -> str | None:
        """Return a clause on the first linear whose sizes are no multiples of these, None where all are."""
        for name, (height, width) in self.shapes.items():
            if width % inputs or height % outputs:
                return f"{name} has {width} inputs and {height} outputs, not multiples of {inputs} and {outputs}"
        return None


class Format(ABC):
    """One kind of output folder."""

    name: ClassVar[str]
    rounds_activations: ClassVar[bool] = False
    """Whether what loads it rounds activations as the scheme says."""

    @abstractmethod
    def refusal(self, facts: Facts) -> str | None:
        """Return why this format cannot hold such a model, as a clause, or None where it can."""

    @abstractmethod
    def loads(self, facts: Facts) -> tuple[str, ...]:
        """Return what loads such a model and from which version, and what is known not to."""

    def weight_bits(self, facts: Facts) -> float | None:
        """Return what a weight of a quantized linear takes on disk, scales included; None: what the scheme says."""
        return None

    def tolerance(self, facts: Facts) -> float:
        """Return how far a weight read back may lie from the solved one, in steps of its scale."""
        return 0.0

    @abstractmethod
    def write(self, solved: Solved, folder: Path) -> None:
        """Write the model into an empty folder, a block at a time."""

    @abstractmethod
    def read(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield every quantized linear by full name with the weight (O, I) that the written files stand for."""

    @abstractmethod
    def read_kept(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield every other tensor that was written, under its name and in its shape in the model."""


def deviation(weight_OI: Tensor, solved: QTensor) -> float:
    """Return how far a weight lies from the solved one at most, in steps of its scale; 0 means equal bit for bit."""
    expected_OI = solved.dequantize(weight_OI.dtype)
    if torch.equal(weight_OI, expected_OI):
        return 0.0
    if weight_OI.shape != expected_OI.shape:
        return float("inf")
    group = expected_OI.shape[1] // solved.scale_OG.shape[1]
    step_OI = solved.scale_OG.float().repeat_interleave(group, 1)
    return float(((weight_OI.float() - expected_OI.float()).abs() / step_OI).max())
