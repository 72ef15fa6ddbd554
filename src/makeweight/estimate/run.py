"""What a run will take, before it starts: time, memory and disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from makeweight.errors import UserError
from makeweight.estimate.memory import gpu_bytes, peak_bytes
from makeweight.estimate.work import evaluation_seconds, solving_seconds
from makeweight.methods.base import FinetuneStep
from makeweight.numerics.grid import scale_dtype_of
from makeweight.paths import expanded
from makeweight.plan import Plan
from makeweight.recipe import Recipe

if TYPE_CHECKING:
    from makeweight.models.checkpoint import Checkpoint

DENSE = "dense"
"""The one format that is as large as the original."""
Widths = Mapping[str, float]
"""Bits of a weight, scales included, by format: of those that do not take what the scheme says."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of solving and of evaluating, peak bytes of memory and what of them a GPU holds, bytes on disk."""

    seconds: float
    memory_bytes: float
    disk_bytes: float
    blocks: int
    evaluate_seconds: float = 0.0
    gpu_bytes: float = 0.0

    def sentence(self) -> str:
        """Say it in one line."""
        if not self.blocks:
            return f"All blocks are solved: what is left will take {_span(self.seconds + self.evaluate_seconds)}."
        after = f" and evaluating {_span(self.evaluate_seconds)}" if self.evaluate_seconds else ""
        return (
            f"Solving {self.blocks} blocks will take {_span(self.seconds)}{after}, {self.memory_bytes / 1e9:.1f} GB of "
            f"memory and {self.disk_bytes / 1e9:.2f} GB on disk."
        )


def _span(seconds: float) -> str:
    if seconds < 5:
        return "a few seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds >= 120 else f"about {seconds:.0f} seconds"


def estimate(
    plan: Plan,
    recipe: Recipe,
    ckpt: Checkpoint,
    blocks: range,
    device: torch.device,
    *,
    windows: int = 0,
    solved: bool = False,
    left: Sequence[int] | None = None,
    tuned: float = 0.0,
    widths: Widths | None = None,
) -> Estimate:
    """Estimate a run from shapes, and time from this machine's own matrix-product rates, measured in a moment.

    `windows` is how many are evaluated; of what is `solved` only formats are still to be written. Time is that of the
    blocks that are `left` (None: all), of passing those before them, and of learning the whole network but for
    the share that is `tuned`. Raises UserError where the disk cannot hold the result.
    """
    shapes = {index: list(ckpt.linear_shapes(index).values()) for index in range(ckpt.n_blocks)}
    left = blocks if left is None else left
    return Estimate(
        seconds=solving_seconds(plan, recipe, ckpt, shapes, left, device, tuned=tuned),
        memory_bytes=peak_bytes(plan, recipe, ckpt, shapes, blocks, device, windows=windows),
        disk_bytes=room(plan, recipe, ckpt, blocks, solved=solved, widths=widths),
        blocks=len(left),
        evaluate_seconds=evaluation_seconds(recipe, ckpt, shapes, windows, device) if windows else 0.0,
        gpu_bytes=0.0 if device.type == "cpu" else gpu_bytes(plan, recipe, ckpt, shapes, blocks, device),
    )


def room(
    plan: Plan, recipe: Recipe, ckpt: Checkpoint, blocks: range, *, solved: bool, widths: Widths | None = None
) -> float:
    """Return bytes on disk of a run, where `solved` of its formats alone; raises UserError where there are fewer."""
    shapes = {index: list(ckpt.linear_shapes(index).values()) for index in range(ckpt.n_blocks)}
    result, of = _disk(recipe, ckpt, shapes, blocks), widths or {}
    disk = sum(
        _plain(ckpt) if name == DENSE else _disk(recipe, ckpt, shapes, blocks, of.get(name))
        for name in dict.fromkeys(recipe.formats)
    )
    if not solved:
        disk += result + (_scratch(plan.finetune, recipe, shapes, blocks) if plan.finetune else 0)
    _check_disk(recipe, disk, solved=solved)
    return disk


def _check_disk(recipe: Recipe, disk: float, *, solved: bool) -> None:
    """Refuse a result that does not fit; what an earlier run has written of it is there already."""
    out = expanded(recipe.out).absolute()
    begun = not solved and os.path.isdir(out)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if begun else 0
    disk_of = next(path for path in (out, *out.parents) if os.path.exists(path))
    if (free := shutil.disk_usage(disk_of).free) < (wanted := disk - written):
        raise UserError(
            f"{recipe.out} needs {wanted / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB: free some space."
        )


def _disk(
    recipe: Recipe,
    ckpt: Checkpoint,
    shapes: dict[int, list[tuple[int, int]]],
    blocks: range,
    width: float | None = None,
) -> float:
    """Return bytes of the result: what is stored, with the chosen blocks' linears at their new width, or at `width`."""
    scheme = recipe.scheme
    saved = 0.0
    for index in blocks:
        for rows, columns in shapes[index]:
            group = columns if scheme.group_size == -1 else scheme.group_size
            scale = 8 * torch.promote_types(scale_dtype_of(scheme, ckpt.dtype), ckpt.dtype).itemsize  # as it is stored
            bits = scheme.bits + (scale + scheme.bits) / group if width is None else width
            saved += rows * columns * (ckpt.dtype.itemsize - bits / 8)
    return _plain(ckpt) - saved


def _plain(ckpt: Checkpoint) -> float:
    """Return bytes of all parameters unquantized; those of the file are fewer where it is packed."""
    return sum(map(math.prod, ckpt.parameters().values())) * ckpt.dtype.itemsize


def _scratch(step: FinetuneStep, recipe: Recipe, shapes: dict[int, list[tuple[int, int]]], blocks: range) -> float:
    """Return bytes of what learning of the whole network sets aside: codes, and twice its state (old file and new).

    The state is the learned values, the best of them, and their moments.
    """
    learned = codes = 0.0
    for index in blocks:
        for rows, columns in shapes[index]:
            group = columns if recipe.scheme.group_size == -1 else recipe.scheme.group_size
            codes += rows * columns
            learned += rows * columns * ((1 if step.weight_bytes else 0) + 1 / group)
    return codes + 2 * 4 * 4 * learned
