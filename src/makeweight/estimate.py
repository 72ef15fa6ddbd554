"""What a run will take, before it starts: time, memory and disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from makeweight.calib.written import writing_bytes
from makeweight.errors import UserError
from makeweight.evals import perplexity, predictions
from makeweight.methods.base import FinetuneStep
from makeweight.numerics.attention import kept_bytes
from makeweight.numerics.flops import block_flops, matmul_rate, step_flops, step_rate
from makeweight.numerics.grid import scale_dtype_of
from makeweight.paths import expanded
from makeweight.plan import Plan
from makeweight.recipe import Recipe
from makeweight.sweep import finetune, fit
from makeweight.sweep.curvature import PROBES

if TYPE_CHECKING:
    from makeweight.models.checkpoint import Checkpoint

EFFICIENCY = 0.5
"""Share of the rate of one linear alone, or of plain products, that whole blocks reach."""
WRITING = 0.2
"""Share of that at which a model writes, token by token."""
GRID_TOKENS = 256
"""Tokens whose products take as long as putting every weight on its grid does in a step of the whole network."""
BASE_BYTES = 700e6
"""Python, torch and transformers."""
DENSE = "dense"
"""The one format that is as large as the original."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of solving and of evaluating, peak bytes of memory, bytes on disk."""

    seconds: float
    memory_bytes: float
    disk_bytes: float
    blocks: int
    evaluate_seconds: float = 0.0

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
    tuned: bool = False,
) -> Estimate:
    """Estimate a run from shapes, and time from this machine's own matrix-product rates, measured in a moment.

    `windows` is how many are evaluated; of what is `solved` only formats are still to be written. Time is that of the
    blocks that are `left` (None: all), and of learning the whole network where it is not `tuned`. Raises UserError
    where the disk cannot hold the result.
    """
    shapes = {index: list(ckpt.linear_shapes(index).values()) for index in range(ckpt.n_blocks)}
    result = _disk(recipe, ckpt, shapes, blocks)
    disk = sum(_plain(ckpt) if name == DENSE else result for name in dict.fromkeys(recipe.formats))
    if not solved:
        disk += result + (_scratch(plan.finetune, recipe, shapes, blocks) if plan.finetune else 0)
    _check_disk(recipe, disk, solved=solved)
    left = blocks if left is None else left
    largest = max(shapes.values(), key=lambda found: sum(math.prod(shape) for shape in found))
    outside = BASE_BYTES + _resident(ckpt)
    memory = outside + 10 * sum(map(math.prod, largest))  # a block as it is read, in fp32, quantized, and its codes
    seconds = ckpt.stored_bytes() / 200e6
    if plan.calibrates:
        memory = max(memory, outside + _learning(plan, recipe, ckpt, largest))
        rate = _rate(recipe, largest, device)
        if recipe.calib.written:
            memory = max(memory, outside + writing_bytes(ckpt, recipe.calib.seqlen))
            seconds += _writing_work(recipe, ckpt, shapes) / rate / WRITING
        seconds += sum(_block_work(plan, recipe, ckpt, shapes[index]) for index in left) / rate
        if plan.finetune is not None:
            memory = max(memory, outside + _finetuning(plan.finetune, recipe, ckpt, shapes, blocks))
            seconds += 0.0 if tuned else _finetune_work(plan.finetune, recipe, ckpt, shapes) / rate
    evaluating = 0.0
    if windows:
        memory = max(memory, BASE_BYTES + _evaluating(recipe, ckpt, largest, windows))
        evaluating = (1 + recipe.eval.baseline) * _evaluation_seconds(recipe, ckpt, shapes, windows, device)
    return Estimate(
        seconds=seconds, memory_bytes=memory, disk_bytes=disk, blocks=len(left), evaluate_seconds=evaluating
    )


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


def _disk(recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]], blocks: range) -> float:
    """Return bytes of the result: what is stored, with the chosen blocks' linears at their new width."""
    scheme = recipe.scheme
    saved = 0.0
    for index in blocks:
        for rows, columns in shapes[index]:
            group = columns if scheme.group_size == -1 else scheme.group_size
            scale = 8 * torch.promote_types(scale_dtype_of(scheme, ckpt.dtype), ckpt.dtype).itemsize  # as it is stored
            saved += rows * columns * (ckpt.dtype.itemsize - (scheme.bits + (scale + scheme.bits) / group) / 8)
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


def _resident(ckpt: Checkpoint) -> float:
    """Return bytes of what stays in memory: everything outside the blocks."""
    inside = f"{ckpt.spec.blocks}."
    sizes = (math.prod(shape) for name, shape in ckpt.parameters().items() if not name.startswith(inside))
    return sum(sizes) * ckpt.dtype.itemsize


def _learning(plan: Plan, recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]]) -> float:
    """Return bytes of streams, the blocks in memory, a chain with its gradients, and one batch's activations."""
    config, calib, tune = ckpt.config.get_text_config(), recipe.calib, recipe.tune
    weights = sum(math.prod(shape) for shape in shapes)
    ahead = len(plan.loss.weights()) - 1
    size = _forward_bytes(recipe)
    streams = (3 + ahead + (plan.target is not None)) * calib.samples * calib.seqlen * config.hidden_size * size
    factors = sum((rows + columns) * min(rows, columns) for rows, columns in shapes) * size
    chain = weights * (4 * 6 + plan.weight_bytes) + (0 if plan.band is None else factors)
    reads = any(step.reads_inputs for step in (*plan.exact, plan.grid))
    products = 4 * sum(columns**2 for _, columns in shapes) if reads else 0
    if plan.rounding is not None:
        products = max(products, 4 * 4 * max(columns for _, columns in shapes) ** 2)
    activations = (1 + ahead) * _activations(ckpt, recipe, tune.batch_size)
    return streams + (1 + ahead) * weights * size + chain + products + activations


def _forward_bytes(recipe: Recipe) -> int:
    """Return bytes of a number of the forward pass."""
    return getattr(torch, recipe.tune.dtype).itemsize


def _activations(ckpt: Checkpoint, recipe: Recipe, batch_size: int) -> float:
    """Return bytes that one block keeps of one batch for its backward pass."""
    config, seqlen = ckpt.config.get_text_config(), recipe.calib.seqlen
    heads, each = getattr(config, "num_attention_heads", 1), 34 * _forward_bytes(recipe)
    if recipe.scheme.activations < 16:
        each += 60  # what enters each linear, in fp32 before it is rounded
    return each * batch_size * seqlen * config.hidden_size + kept_bytes(batch_size, heads, seqlen)


def _finetuning(
    step: FinetuneStep, recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]], blocks: range
) -> float:
    """Return bytes of all codes, their scales as they are learned, two streams, and what the backward pass keeps.

    Codes lie in a file that is mapped: where memory is short they need not stay in it.
    """
    config, calib, size = ckpt.config.get_text_config(), recipe.calib, _forward_bytes(recipe)
    memory = 0.0
    for index, found in shapes.items():
        weights = sum(math.prod(shape) for shape in found)
        group = recipe.scheme.group_size if recipe.scheme.group_size > 0 else found[0][1]
        memory += weights * (1 + 24 / group + step.weight_bytes) if index in blocks else size * weights
    memory += 2 * calib.samples * calib.seqlen * config.hidden_size * size
    states = step.batch_size * calib.seqlen * config.hidden_size * size
    if step.recompute:
        memory += len(shapes) * states + _activations(ckpt, recipe, step.batch_size)
    else:  # with the weights of every block, and their codes once more
        memory += len(shapes) * _activations(ckpt, recipe, step.batch_size)
        memory += sum((1 + size) * math.prod(shape) for index in blocks for shape in shapes[index])
    largest = max(sum(math.prod(shape) for shape in found) for found in shapes.values())
    return memory + 4 * 6 * largest + 6 * finetune.LOGIT_BYTES


def _finetune_work(
    step: FinetuneStep, recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]]
) -> float:
    """Return operations of steps (forward, perhaps that again, backward, grid, head), of the original, of checks."""
    config, calib = ckpt.config.get_text_config(), recipe.calib
    tokens = step.batch_size * calib.seqlen
    blocks = sum(block_flops(found, config.hidden_size, step.batch_size, calib.seqlen) for found in shapes.values())
    grid = 6 * GRID_TOKENS * sum(math.prod(shape) for found in shapes.values() for shape in found)
    head = 2 * tokens * config.hidden_size * config.vocab_size
    held = max(1, calib.samples // finetune.HELD_OUT)
    used, checked = min(calib.samples, held + step.steps * step.batch_size), (finetune.CHECKS + 1) * held
    passes = used / step.batch_size * blocks / 3 + checked / step.batch_size * (blocks / 3 + 2 * head)
    return step.steps * ((4 / 3 if step.recompute else 1) * (blocks + grid) + 3 * head) + passes


def _evaluating(recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]], windows: int) -> float:
    """Return bytes of evaluating: norms and head in fp32, a block, every window's hidden states, a batch, logits.

    Norms, head and states of the original are there as well where it is compared with.
    """
    config, size = ckpt.config.get_text_config(), ckpt.dtype.itemsize
    states = windows * recipe.eval.seqlen * config.hidden_size * size
    batch = 16 * max(perplexity.BATCH_TOKENS, recipe.eval.seqlen) * config.hidden_size * size
    outside = _resident(ckpt) * 4 / size
    models = 1 + recipe.eval.baseline
    block = size * sum(math.prod(shape) for shape in shapes)
    return models * (outside + states) + block + batch + 2 * models * predictions.LOGIT_BYTES


def _rate(recipe: Recipe, shapes: Sequence[tuple[int, int]], device: torch.device) -> float:
    """Return the operations per second of learning, by those of the largest linear alone."""
    tokens = recipe.tune.batch_size * recipe.calib.seqlen
    dtype = getattr(torch, recipe.tune.dtype)
    return EFFICIENCY * step_rate(
        max(shapes, key=math.prod), tokens, recipe.scheme.group_size, device=device, dtype=dtype
    )


def _evaluation_seconds(
    recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]], windows: int, device: torch.device
) -> float:
    """Return the time of a forward pass of all windows, and of the head in fp32."""
    config, seqlen = ckpt.config.get_text_config(), recipe.eval.seqlen
    blocks = sum(block_flops(found, config.hidden_size, windows, seqlen) for found in shapes.values()) / 3
    head = 2 * windows * seqlen * config.hidden_size * config.vocab_size
    return (
        blocks / matmul_rate(device, dtype=ckpt.dtype) + head / matmul_rate(device, dtype=torch.float32)
    ) / EFFICIENCY


def _writing_work(recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]]) -> float:
    """Return operations of the model's forward pass over the text it writes, and of its head."""
    config, calib = ckpt.config.get_text_config(), recipe.calib
    blocks = sum(block_flops(found, config.hidden_size, calib.written, calib.seqlen) for found in shapes.values()) / 3
    return blocks + 2 * calib.written * calib.seqlen * config.hidden_size * config.vocab_size


def _block_work(plan: Plan, recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]]) -> float:
    """Return operations of one block: its steps, and the two streams' forward passes."""
    hidden, calib, tune = ckpt.config.get_text_config().hidden_size, recipe.calib, recipe.tune
    ahead = len(plan.loss.weights()) - 1
    passes = (2 + (plan.target is not None)) / 3 * block_flops(shapes, hidden, calib.samples, calib.seqlen)
    tokens = calib.samples * calib.seqlen
    if plan.rounding is not None:
        # What comes before each group of linears, about a pass and a half in all; products of inputs; the feedback.
        passes += 1.5 / 3 * block_flops(shapes, hidden, calib.samples, calib.seqlen)
        passes += sum(2 * tokens * columns**2 + 2 * rows * columns**2 for rows, columns in shapes)
    for step in (*plan.exact, plan.grid):
        if step.reads_inputs:
            # A pass with the products of inputs, then about twenty candidates against them.
            passes += block_flops(shapes, hidden, calib.samples, calib.seqlen) / 3
            passes += sum(2 * tokens * columns**2 + 40 * rows * columns**2 for rows, columns in shapes)
    if not plan.learns:
        return passes
    steps = tune.steps + (PROBES if plan.grid.by_flips else 0)
    checked = (tune.checks + 2) * fit.held_out(calib.samples)
    passes += (1 + ahead) * block_flops(shapes, hidden, checked, calib.seqlen) / 3
    return passes + steps * step_flops(shapes, hidden, tune.batch_size, calib.seqlen, ahead=ahead, band=plan.band)
