"""Exact rescaling along a spec's edges, as pure and differentiable functions of one block's weights.

A state is `dict[str, Tensor]` with names relative to the block. Source: SmoothQuant (arXiv 2211.10438) section 4
and OmniQuant (arXiv 2308.13137) section 3.3, with kv heads repeated over their query groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from makeweight.models.spec import Edge, HeadShape, ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

State = dict[str, Tensor]


def rows(spec: ModelSpec, config: PretrainedConfig, name: str, height: int | None = None) -> tuple[str, slice]:
    """Return the stored linear that holds the projection `name`, and which of its rows.

    `height` is the number of rows of the stored linear; only parts that are "half" of it need it.
    """
    for fused in spec.fused:
        start = 0
        for part, kind in fused.parts:
            head = HeadShape.of(config)
            size = {"query": head.query * head.dim, "kv": head.kv * head.dim, "half": (height or 0) // 2}[kind]
            if part == name:
                return fused.linear, slice(start, start + size)
            start += size
    return name, slice(None)


def _rows_in(state: State, spec: ModelSpec, config: PretrainedConfig, name: str) -> tuple[str, slice]:
    linear, _ = rows(spec, config, name)
    return rows(spec, config, name, state[f"{linear}.weight"].shape[0])


def channels(state: State, spec: ModelSpec, config: PretrainedConfig, edge: Edge) -> int:
    """Return how many scales the edge has: one per output channel of its source."""
    name, part = _rows_in(state, spec, config, edge.src)
    return state[f"{name}.weight"][part].shape[0]


def _scale_rows(state: State, name: str, part: slice, scale: Tensor) -> State:
    changed: State = {}
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in state:
            tensor = state[key]
            full = torch.ones(tensor.shape[0], dtype=scale.dtype, device=scale.device)
            full[part] = scale
            changed[key] = tensor * (full[:, None] if tensor.ndim == 2 else full)
    return changed


def per_reader(scale: Tensor, spec: ModelSpec, config: PretrainedConfig, edge: Edge) -> Tensor:
    """Return one value per input of the edge's readers from one per output of its source."""
    if spec.heads is None or edge.src != spec.heads[0]:
        return scale
    head = HeadShape.of(config)
    return scale.view(head.kv, head.dim).repeat_interleave(head.query // head.kv, dim=0).flatten()


def per_source(values: Tensor, spec: ModelSpec, config: PretrainedConfig, edge: Edge) -> Tensor:
    """Return one value per output of the edge's source: the mean of those of the inputs that it feeds."""
    if spec.heads is None or edge.src != spec.heads[0]:
        return values
    head = HeadShape.of(config)
    return values.view(head.kv, head.query // head.kv, head.dim).mean(1).flatten()


def rescale(state: State, spec: ModelSpec, config: PretrainedConfig, edge: Edge, scale: Tensor) -> State:
    """Multiply the source's output channels by positive `scale` and divide the readers' columns by it.

    `scale` has `channels(...)` entries. Returns a new state in which only the touched tensors are new; the
    block's function is unchanged.
    """
    changed = dict(state)
    if edge.src in spec.norms:
        weight = state[f"{edge.src}.weight"]
        changed[f"{edge.src}.weight"] = (weight + spec.norm_offset) * scale - spec.norm_offset
        if f"{edge.src}.bias" in state:
            changed[f"{edge.src}.bias"] = state[f"{edge.src}.bias"] * scale
    else:
        name, part = _rows_in(state, spec, config, edge.src)
        changed |= _scale_rows(state, name, part, scale)
    columns = per_reader(scale, spec, config, edge)
    for name in edge.dst:
        changed[f"{name}.weight"] = changed[f"{name}.weight"] / columns
    return changed


def qk_free(spec: ModelSpec, config: PretrainedConfig) -> tuple[int, int]:
    """Return the shape (K, F) of the scales that query and key admit: rotated channels are tied in pairs."""
    head = HeadShape.of(config)
    return head.kv, head.dim - (head.rotary // 2 if spec.rotary else 0)


def rescale_qk(state: State, spec: ModelSpec, config: PretrainedConfig, scale_KF: Tensor) -> State:
    """Multiply the key's rows by the positive scales and divide the query's by them: q . k is unchanged.

    `scale_KF` has the shape `qk_free(...)`; each kv head's scales are repeated over its query heads. Rotary
    positions mix channels e and e + R/2 of a head, so these two share a scale.
    """
    assert spec.qk is not None
    head = HeadShape.of(config)
    half = head.rotary // 2 if spec.rotary else 0
    scale_KE = torch.cat([scale_KF[:, :half], scale_KF], dim=1)
    query, key = (_rows_in(state, spec, config, name) for name in spec.qk)
    changed = dict(state)
    changed |= _scale_rows(changed, *key, scale_KE.flatten())
    changed |= _scale_rows(changed, *query, 1 / scale_KE.repeat_interleave(head.query // head.kv, dim=0).flatten())
    return changed
