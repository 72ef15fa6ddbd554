"""A model family as data: where its parts are and which outputs feed which inputs.

Letters: `H` query heads, `K` kv heads, `E` head dim, `F` free scales of a head's query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Rows = Literal["query", "kv", "half"]


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The output of `src` is, channel by channel, the input of every linear in `dst` (names relative to a block).

    Channels meet one to one, except from the value projection to the output projection, where each kv head
    feeds a group of query heads.
    """

    src: str
    dst: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """One stored linear whose rows hold several projections, in order: (name of the part, what its rows are).

    "query" rows are H*E, "kv" rows are K*E, "half" is half of the matrix.
    """

    linear: str
    parts: tuple[tuple[str, Rows], ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Names, paths and edges of one family; every edge is proved on a model by `models.validate`.

    `blocks`, `embedding`, `final_norm` and `head` are paths in the model; all other names are relative to a
    block. A name in `edges`, `heads` or `qk` may be a part of a `fused` linear: `models.rescale.rows` finds it.
    `requires` are configuration values without which this spec does not apply: (attribute, value).
    """

    family: str
    architectures: tuple[str, ...]
    blocks: str
    embedding: str
    final_norm: str | None
    head: str | None
    edges: tuple[Edge, ...] = ()
    residual_writers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    """Norms that are the `src` of an edge."""
    output_norms: tuple[str, ...] = ()
    """Norms between a residual writer and the residual stream (Gemma): the writer's output must not be scaled."""
    heads: tuple[str, str] | None = None
    """The value and output projections."""
    qk: tuple[str, str] | None = None
    """The query and key projections, where nothing normalises in between."""
    rotary: bool = True
    """Whether positions rotate channel e of a head with channel e + R/2, which ties their q and k scales."""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    """What the norm adds to its stored weight: 1 where w - 1 is stored."""
    needs_start: bool = False
    """Whether text without the tokenizer's first token makes no sense to the model (Gemma)."""
    fused: tuple[Fused, ...] = ()
    requires: tuple[tuple[str, object], ...] = ()
    notes: str = ""

    def accepts(self, architecture: str, config: PretrainedConfig) -> bool:
        """Say whether this spec describes the class `architecture` under this configuration."""
        known = architecture in self.architectures
        return known and all(getattr(config, name, None) == value for name, value in self.requires)


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The shape of attention: H query heads, K kv heads of E channels, of which the first `rotary` are rotated."""

    query: int
    kv: int
    dim: int
    rotary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> HeadShape:
        """Read the shape from a configuration's usual names."""
        query: int = config.num_attention_heads
        kv: int = getattr(config, "num_key_value_heads", None) or query
        dim: int = getattr(config, "head_dim", None) or config.hidden_size // query
        rope = getattr(config, "rope_parameters", None) or {}
        factor = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        return cls(query=query, kv=kv, dim=dim, rotary=int(dim * factor))
