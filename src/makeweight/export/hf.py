"""What Hugging Face folders of all formats share: shards that fill up block by block, config.json, the side files."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from makeweight.export.base import Format
from makeweight.export.folder import copy_files, save_tensors
from makeweight.models.shards import INDEX, Shards
from makeweight.numerics.qtensor import QTensor
from makeweight.paths import settle

if TYPE_CHECKING:
    from makeweight.export.solved import Solved

SHARD_BYTES = 2_000_000_000
"""A shard is written when it has grown to this; what waits for it is all that is held in memory."""


class HfFormat(Format):
    """A folder of safetensors in which other tensors stand in the place of each linear's weight."""

    parts: ClassVar[tuple[str, ...]]
    """Names of the tensors that may stand for a linear, without the linear's own."""

    @abstractmethod
    def pack(self, tensor: QTensor, solved: Solved) -> dict[str, Tensor]:
        """Return the tensors that stand for a linear, by names of `parts`."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], solved: Solved) -> Tensor:
        """Return the weight (O, I) that stored tensors stand for, not by undoing what `pack` does."""

    @abstractmethod
    def quantization_config(self, solved: Solved) -> dict[str, Any] | None:
        """Return what config.json says of the quantization, None where nothing is to be said."""

    def side_texts(self, solved: Solved) -> dict[str, str]:
        """Return what else to write, by name of the file."""
        return {}

    def write(self, solved: Solved, folder: Path) -> None:  # noqa: D102
        shards = ShardWriter(folder)
        for part in solved.parts():
            tensors = dict(part.kept)
            for name, tensor in part.quantized.items():
                tensors |= {f"{name}.{suffix}": packed for suffix, packed in self.pack(tensor, solved).items()}
            shards.add(tensors)
        shards.close()
        copy_files(solved.side_files(), solved.path, folder)
        config = self.quantization_config(solved)
        whole = solved.config if config is None else {**solved.config, "quantization_config": config}
        write_json(folder / "config.json", whole)
        for name, text in self.side_texts(solved).items():
            (folder / name).write_text(text, encoding="utf-8")

    def read(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        shards = Shards(folder)
        for name in solved.names:
            held = [suffix for suffix in self.parts if f"{name}.{suffix}" in shards.entries]
            stored = dict(zip(held, (shards.read(f"{name}.{suffix}") for suffix in held), strict=True))
            yield name, self.unpack(stored, solved)

    def read_kept(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        shards, own = Shards(folder), {f"{name}.{suffix}" for name in solved.names for suffix in self.parts}
        yield from shards.read_many([name for name in shards.entries if name not in own])


class ShardWriter:
    """Collects tensors into shards of `limit` bytes; their names, which tell how many there are, come at the end."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self.waiting: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a block's tensors, and write a shard when enough have come."""
        self.waiting |= tensors
        if sum(tensor.nbytes for tensor in self.waiting.values()) >= self.limit:
            self._flush()

    def close(self) -> None:
        """Write what waits, and give the shards their names: one file, or several with an index."""
        if self.waiting:
            self._flush()
        count = len(self.written)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self.written):
            final = "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            settle(self._part(index), self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": weight_map})

    def _flush(self) -> None:
        save_tensors(self.waiting, self._part(len(self.written)), {"format": "pt"})
        self.total += sum(tensor.nbytes for tensor in self.waiting.values())
        self.written.append(list(self.waiting))
        self.waiting = {}

    def _part(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05d}.part"


def left_alone(solved: Solved) -> list[str]:
    """Return the modules whose linears were not quantized, without `lm_head`, which no format here packs.

    Where none of a parent's linears was, the parent stands for them: runtimes fuse some of them under another name.
    A block, known by its number, does not: runtimes look for what they read anywhere in a name, and 1 is in 10.
    """
    found: dict[str, None] = {}
    for name in solved.ignore:
        parent = name.rpartition(".")[0]
        numbered = parent.rpartition(".")[2].isdigit()
        mixed = not parent or numbered or any(_inside(other, parent) for other in solved.names)
        if name != "lm_head":
            found[name if mixed else parent] = None
    return list(found)


def _inside(stored: str, module: str) -> bool:
    """Whether a stored name lies in a module; some checkpoints are stored without the first parts of all names."""
    parts = module.split(".")
    return any(stored.startswith(f"{'.'.join(parts[first:])}.") for first in range(len(parts)))


def json_text(value: Mapping[str, Any]) -> str:
    """Return indented JSON with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON with sorted keys."""
    file.write_text(json_text(value), encoding="utf-8")
