"""Bytes in memory, by the part of a run that needs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from makeweight.calib.written import writing_bytes
from makeweight.evals import perplexity, predictions
from makeweight.methods.base import FinetuneStep
from makeweight.numerics.attention import kept_bytes
from makeweight.numerics.precision import fast_dtype, named_dtype
from makeweight.plan import Plan, in_pieces
from makeweight.recipe import Recipe
from makeweight.sweep import finetune

if TYPE_CHECKING:
    from makeweight.models.checkpoint import Checkpoint

BASE_BYTES = 700e6
"""Python, torch and transformers."""


def peak_bytes(
    plan: Plan,
    recipe: Recipe,
    ckpt: Checkpoint,
    shapes: dict[int, list[tuple[int, int]]],
    blocks: range,
    device: torch.device,
    *,
    windows: int,
) -> float:
    """Return the most that a run holds at a time, with the evaluation of so many windows."""
    largest = max(shapes.values(), key=lambda found: sum(math.prod(shape) for shape in found))
    outside, size = BASE_BYTES + _resident(ckpt), named_dtype(recipe.tune.dtype, device).itemsize
    cut = in_pieces(plan, recipe)
    parts = [outside + 10 * sum(map(math.prod, largest))]  # a block as it is read, in fp32, quantized, and its codes
    if plan.calibrates:
        parts.append(outside + _learning(plan, cut, ckpt, largest, device, size))
        if recipe.calib.written:
            parts.append(BASE_BYTES + writing_bytes(ckpt, cut.calib.seqlen, device))
        if plan.finetune is not None:
            whole = _finetuning(plan.finetune, recipe, ckpt, shapes, blocks, device, size)
            parts.append(BASE_BYTES + _wider(ckpt, size) * _resident(ckpt) + whole)
    if windows:
        parts.append(BASE_BYTES + _evaluating(recipe, ckpt, largest, windows, device))
    return max(parts)


def gpu_bytes(
    plan: Plan,
    recipe: Recipe,
    ckpt: Checkpoint,
    shapes: dict[int, list[tuple[int, int]]],
    blocks: range,
    device: torch.device,
) -> float:
    """Return the most that a GPU holds of learning: hidden states of all samples, and Python, are elsewhere."""
    if not plan.calibrates:
        return 0.0
    largest = max(shapes.values(), key=lambda found: sum(math.prod(shape) for shape in found))
    size = named_dtype(recipe.tune.dtype, device).itemsize
    cut, stream = in_pieces(plan, recipe), _stream(recipe, ckpt, size)
    parts = [_resident(ckpt), _learning(plan, cut, ckpt, largest, device, size) - _streams(plan) * stream]
    if recipe.calib.written:
        parts.append(writing_bytes(ckpt, cut.calib.seqlen, device))
    if plan.finetune is not None:
        whole = _finetuning(plan.finetune, recipe, ckpt, shapes, blocks, device, size) - 2 * stream
        parts.append(_wider(ckpt, size) * _resident(ckpt) + whole)
    return max(parts)


def _stream(recipe: Recipe, ckpt: Checkpoint, size: int) -> float:
    """Return bytes of the hidden states of all samples in one place of the network."""
    return recipe.calib.samples * recipe.calib.seqlen * ckpt.config.get_text_config().hidden_size * size


def _streams(plan: Plan) -> int:
    """Return in how many places of the network hidden states are held while a block learns."""
    return 1 + len(plan.loss.weights()) + (plan.target is not None)


def _wider(ckpt: Checkpoint, size: int) -> float:
    """Return how much more the head takes where it computes in the dtype of learning."""
    return max(1.0, size / ckpt.dtype.itemsize)


def _resident(ckpt: Checkpoint) -> float:
    """Return bytes of what stays in memory: everything outside the blocks."""
    inside = f"{ckpt.spec.blocks}."
    sizes = (math.prod(shape) for name, shape in ckpt.parameters().items() if not name.startswith(inside))
    return sum(sizes) * ckpt.dtype.itemsize


def _learning(
    plan: Plan,
    recipe: Recipe,
    ckpt: Checkpoint,
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    size: int,
) -> float:
    """Return bytes of streams, the blocks in memory, a chain with its gradients, and one batch's activations.

    `size` is bytes of a number of the forward pass.
    """
    weights = sum(math.prod(shape) for shape in shapes)
    ahead = len(plan.loss.weights()) - 1
    streams = _streams(plan) * _stream(recipe, ckpt, size)
    factors = sum((rows + columns) * min(rows, columns) for rows, columns in shapes) * size
    chain = weights * (4 * 6 + plan.weight_bytes) + (0 if plan.band is None else factors)
    reads = any(step.reads_inputs == "products" for step in (*plan.exact, plan.grid))
    products = 4 * sum(columns**2 for _, columns in shapes) if reads else 0
    if plan.rounding is not None:
        products = max(products, 4 * 4 * max(columns for _, columns in shapes) ** 2)
    activations = _activations(ckpt, recipe, recipe.tune.batch_size, size, device, blocks=1 + ahead)
    return streams + (1 + ahead) * weights * size + chain + products + activations


def _finetuning(
    step: FinetuneStep,
    recipe: Recipe,
    ckpt: Checkpoint,
    shapes: dict[int, list[tuple[int, int]]],
    blocks: range,
    device: torch.device,
    size: int,
) -> float:
    """Return bytes of all codes, their scales as they are learned, two streams, and what the backward pass keeps.

    Codes lie in a file that is mapped: where memory is short they need not stay in it. `size` is as in `_learning`.
    """
    config, calib = ckpt.config.get_text_config(), recipe.calib
    memory, vocabulary = 0.0, config.vocab_size
    for index, found in shapes.items():
        weights = sum(math.prod(shape) for shape in found)
        group = recipe.scheme.group_size if recipe.scheme.group_size > 0 else found[0][1]
        memory += weights * (1 + 24 / group + step.weight_bytes) if index in blocks else size * weights
    memory += 2 * _stream(recipe, ckpt, size)
    states = step.batch_size * calib.seqlen * config.hidden_size * size
    if step.recompute:
        memory += len(shapes) * states + _activations(ckpt, recipe, step.batch_size, size, device)
    else:  # with the weights of every block, and their codes once more
        memory += _activations(ckpt, recipe, step.batch_size, size, device, blocks=len(shapes))
        memory += sum((1 + size) * math.prod(shape) for index in blocks for shape in shapes[index])
    largest = max(sum(math.prod(shape) for shape in found) for found in shapes.values())
    return memory + 4 * 6 * largest + 6 * 4 * vocabulary * finetune.logit_tokens(vocabulary, device)


def _evaluating(
    recipe: Recipe, ckpt: Checkpoint, shapes: Sequence[tuple[int, int]], windows: int, device: torch.device
) -> float:
    """Return bytes of evaluating: norms and head in fp32, a block, every window's hidden states, a batch, logits.

    Norms, head and states of the original are there as well where it is compared with.
    """
    config, size = ckpt.config.get_text_config(), fast_dtype(ckpt.dtype, device).itemsize
    states = windows * recipe.eval.seqlen * config.hidden_size * size
    batch = 16 * max(perplexity.BATCH_TOKENS, recipe.eval.seqlen) * config.hidden_size * size
    outside = _resident(ckpt) * 4 / ckpt.dtype.itemsize
    models = 1 + recipe.eval.baseline
    block = size * sum(math.prod(shape) for shape in shapes)
    return models * (outside + states) + block + batch + 2 * models * predictions.LOGIT_BYTES


def _activations(
    ckpt: Checkpoint, recipe: Recipe, batch_size: int, size: int, device: torch.device, *, blocks: int = 1
) -> float:
    """Return bytes that blocks keep of one batch for their backward pass, and what that takes in one of them."""
    config, seqlen = ckpt.config.get_text_config(), recipe.calib.seqlen
    heads, each = getattr(config, "num_attention_heads", 1), 34 * size
    if recipe.scheme.activations < 16:
        each += 60  # what enters each linear, in fp32 before it is rounded
    kept, passing = kept_bytes(batch_size, heads, seqlen, itemsize=size), 0
    if device.type != "cpu":  # torch's plain attention: all probabilities in fp32, and two more like them going back
        kept = 4 * batch_size * heads * seqlen**2
        passing = 2 * kept
    return blocks * (each * batch_size * seqlen * config.hidden_size + kept) + passing
