"""Operations of a run's parts, and how many of them this machine does per second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from makeweight.methods.base import FinetuneStep
from makeweight.numerics.flops import block_flops, elementwise_rate, matmul_rate, step_flops, step_rate
from makeweight.numerics.precision import fast_dtype, named_dtype
from makeweight.plan import Plan, in_pieces
from makeweight.recipe import Recipe
from makeweight.sweep import finetune, fit, heldout
from makeweight.sweep.curvature import PROBES

if TYPE_CHECKING:
    from makeweight.models.checkpoint import Checkpoint

EFFICIENCY = 0.5
"""Share of the rate of plain products that evaluation reaches."""
ELEMENTWISE = 16
"""Gated activations whose time a block takes besides products, for each channel of a token, forward and backward."""
WRITING = 0.3
"""Share of the rate of learning at which a model writes, token by token."""
READING = 200e6
"""Bytes of a model that are read, rounded and written in a second."""
GRID_TOKENS = 256
"""Tokens whose products take as long as putting every weight on its grid does in a step of the whole network."""


def solving_seconds(
    plan: Plan,
    recipe: Recipe,
    ckpt: Checkpoint,
    shapes: dict[int, list[tuple[int, int]]],
    left: Sequence[int],
    device: torch.device,
    *,
    tuned: float,
) -> float:
    """Return the time until the weights are written: text, blocks that are left, the network less a share `tuned`."""
    seconds = ckpt.stored_bytes() / READING
    if not plan.calibrates:
        return seconds
    cut = in_pieces(plan, recipe)
    largest = max(shapes.values(), key=lambda found: sum(math.prod(shape) for shape in found))
    judging = fit.judging(recipe.calib.samples, cut.calib.samples // recipe.calib.samples)
    work = sum(_block_work(plan, cut, ckpt, shapes[index], judging) for index in left)
    passed = set(range(max(left, default=0))) - set(left)
    work += sum(_passing_work(plan, cut, ckpt, shapes[index]) for index in passed)
    if recipe.calib.written and left:
        work += _writing_work(cut, ckpt, shapes) / WRITING
    if plan.finetune is not None and tuned < 1:
        work += _finetune_work(plan.finetune, recipe, ckpt, shapes, tuned)
    return seconds + work / _rate(cut, ckpt, largest, device)


def _rate(recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]], device: torch.device) -> float:
    """Return the operations per second of a block that learns: products go by its largest linear alone.

    All else that a block does is measured apart: the faster products are, the more of the time it takes.
    """
    tune, seqlen, hidden = recipe.tune, recipe.calib.seqlen, ckpt.config.get_text_config().hidden_size
    dtype = named_dtype(tune.dtype, device)
    largest, tokens = max(shapes, key=math.prod), tune.batch_size * seqlen
    products = step_rate(largest, tokens, recipe.scheme.group_size, device=device, dtype=dtype)
    work = block_flops(shapes, hidden, tune.batch_size, seqlen)
    rest = ELEMENTWISE * tokens * hidden / elementwise_rate(device, dtype=dtype)
    return work / (work / products + rest)


def _passing_work(plan: Plan, recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]]) -> float:
    """Return operations of the streams' forward passes through one block."""
    hidden, calib = ckpt.config.get_text_config().hidden_size, recipe.calib
    return (2 + (plan.target is not None)) / 3 * block_flops(shapes, hidden, calib.samples, calib.seqlen)


def _block_work(plan: Plan, recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]], judging: int) -> float:
    """Return operations of solving one block, whose states `judging` samples tell apart, and of passing it."""
    hidden, calib, tune = ckpt.config.get_text_config().hidden_size, recipe.calib, recipe.tune
    ahead = len(plan.loss.weights()) - 1
    passes = _passing_work(plan, recipe, ckpt, shapes)
    tokens = calib.samples * calib.seqlen
    if plan.rounding is not None:
        # What comes before each group of linears, about a pass and a half in all; products of inputs; the feedback.
        passes += 1.5 / 3 * block_flops(shapes, hidden, calib.samples, calib.seqlen)
        passes += sum(2 * tokens * columns**2 + 2 * rows * columns**2 for rows, columns in shapes)
    for step in (*plan.exact, plan.grid):
        if step.reads_inputs:
            passes += block_flops(shapes, hidden, calib.samples, calib.seqlen) / 3
        if step.reads_inputs == "products":  # and about twenty candidates against them
            passes += sum(2 * tokens * columns**2 + 40 * rows * columns**2 for rows, columns in shapes)
    if not plan.learns:
        return passes
    steps = tune.steps + (PROBES if plan.grid.by_flips else 0)
    passes += (1 + ahead) * block_flops(shapes, hidden, (tune.checks + 2) * judging, calib.seqlen) / 3
    return passes + steps * step_flops(shapes, hidden, tune.batch_size, calib.seqlen, ahead=ahead, band=plan.band)


def _finetune_work(
    step: FinetuneStep, recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]], tuned: float
) -> float:
    """Return operations of steps (forward, perhaps that again, backward, grid, head), of the original, of checks.

    Of steps and checks a share `tuned` is behind; what the original predicts is asked again.
    """
    config, calib = ckpt.config.get_text_config(), recipe.calib
    tokens = step.batch_size * calib.seqlen
    blocks = sum(block_flops(found, config.hidden_size, step.batch_size, calib.seqlen) for found in shapes.values())
    grid = 6 * GRID_TOKENS * sum(math.prod(shape) for found in shapes.values() for shape in found)
    head = 2 * tokens * config.hidden_size * config.vocab_size
    held = heldout.count(calib.samples)
    used, checked = min(calib.samples, held + step.steps * step.batch_size), (finetune.CHECKS + 1) * held
    steps = step.steps * ((4 / 3 if step.recompute else 1) * (blocks + grid) + 3 * head)
    steps += checked / step.batch_size * (blocks / 3 + 2 * head)
    return (1 - tuned) * steps + used / step.batch_size * blocks / 3


def _writing_work(recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]]) -> float:
    """Return operations of the model's forward pass over the text it writes, and of its head."""
    config, calib = ckpt.config.get_text_config(), recipe.calib
    blocks = sum(block_flops(found, config.hidden_size, calib.written, calib.seqlen) for found in shapes.values()) / 3
    return blocks + 2 * calib.written * calib.seqlen * config.hidden_size * config.vocab_size


def evaluation_seconds(
    recipe: Recipe, ckpt: Checkpoint, shapes: dict[int, list[tuple[int, int]]], windows: int, device: torch.device
) -> float:
    """Return the time of a forward pass of all windows, and of the head in fp32; of two models with a baseline."""
    config, seqlen = ckpt.config.get_text_config(), recipe.eval.seqlen
    blocks = sum(block_flops(found, config.hidden_size, windows, seqlen) for found in shapes.values()) / 3
    head = 2 * windows * seqlen * config.hidden_size * config.vocab_size
    seconds = blocks / matmul_rate(device, dtype=fast_dtype(ckpt.dtype, device)) + head / matmul_rate(
        device, dtype=torch.float32
    )
    return (1 + recipe.eval.baseline) * seconds / EFFICIENCY
