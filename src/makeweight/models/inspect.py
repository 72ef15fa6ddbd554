"""Describes a checkpoint as plain data, without reading a weight."""

from __future__ import annotations

import math
from typing import Any

from makeweight.models.checkpoint import Checkpoint
from makeweight.numerics.scheme import GROUP_SIZES


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a user wants to know before quantizing, as JSON-ready data.

    `group_sizes` are those that divide the inputs of every linear in the blocks; -1 (per channel) always fits.
    """
    spec = checkpoint.spec
    sizes = {name: math.prod(shape) for name, shape in checkpoint.parameters().items()}
    shapes: dict[str, tuple[int, int]] = {}
    counts: dict[str, int] = {}
    quantizable = 0
    for i in range(checkpoint.n_blocks):
        for name, shape in checkpoint.linear_shapes(i).items():
            shapes.setdefault(name, shape)
            counts[name] = counts.get(name, 0) + 1
            quantizable += math.prod(shape)
    widths = {width for i in range(checkpoint.n_blocks) for _, width in checkpoint.linear_shapes(i).values()}
    return {
        "name": checkpoint.name,
        "family": spec.family,
        "architecture": (checkpoint.config.architectures or [None])[0],
        "blocks": checkpoint.n_blocks,
        "linears": [
            {"name": name, "out": out, "in": into, "count": counts[name]} for name, (out, into) in shapes.items()
        ],
        "edges": [{"src": edge.src, "dst": list(edge.dst)} for edge in spec.edges],
        "norm": spec.norm,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "parameters": {
            "total": sum(sizes.values()),
            "blocks": sum(size for name, size in sizes.items() if name.startswith(f"{spec.blocks}.")),
            "quantizable": quantizable,
        },
        "tied_embeddings": bool(getattr(checkpoint.config, "tie_word_embeddings", False)),
        "group_sizes": [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)],
        "notes": spec.notes,
    }
