"""Reads safetensors shards one tensor at a time; whatever is damaged is named before any work starts."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from makeweight.errors import UserError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a stored tensor lies, with its shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Shards:
    """Every tensor stored in a folder's safetensors files, read only when asked for.

    Raises `UserError` for a folder without safetensors, a shard that is missing, and a file that is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _shard_files(folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(_read_header(file))

    def read(self, name: str) -> Tensor:
        """Return one tensor, bit for bit as stored."""
        return next(self.read_many([name]))[1]

    def read_many(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the order of `names`, opening each run of names of one file once."""
        from safetensors import safe_open

        position = 0
        while position < len(names):
            file = self.entries[names[position]].file
            with safe_open(file, framework="pt") as handle:
                while position < len(names) and self.entries[names[position]].file == file:
                    yield names[position], handle.get_tensor(names[position])
                    position += 1

    def float_dtype(self, declared: object = None) -> torch.dtype | None:
        """Return the floating dtype that most is stored in, scales left out, or None where nothing is.

        Where linears are packed, what is left may be an embedding that was kept wider: there a dtype that config.json
        declares counts, if anything is stored in it.
        """
        sizes: Counter[torch.dtype] = Counter()
        for name, entry in self.entries.items():
            if entry.dtype.is_floating_point and not name.endswith(".weight_scale"):
                sizes[entry.dtype] += entry.size
        named = getattr(torch, str(declared).removeprefix("torch."), None)
        if named in sizes and any(name.endswith(".weight_scale") for name in self.entries):
            return named
        return sizes.most_common(1)[0][0] if sizes else None

    def digest(self) -> str:
        """Return the sha256 of every shard's bytes, in order of name."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def required_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, or refuse the file in a sentence."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object: download it again.")
    return value


def _shard_files(folder: Path) -> list[Path]:
    if (whole := folder / "model.safetensors").is_file():
        return [whole]  # before an index, as in transformers; what else lies there is not the model
    index = folder / INDEX
    if index.is_file():
        weight_map = required_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map: download it again.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{folder} lacks the weight file {missing[0]} named in {INDEX}: download it again.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise UserError(
            f"{folder} holds its weights as pickle files, which can run code when they are opened: "
            "give a version with .safetensors files."
        )
    raise UserError(f"{folder} holds no .safetensors weights: give a folder that has them.")


def _read_header(file: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    broken = UserError(f"{file} is not a complete safetensors file (cut short or damaged): download it again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise broken
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ends = [info["data_offsets"][1] for info in header.values()]
            whole = 8 + length + max(ends, default=0) == size
            with safe_open(file, framework="pt"):  # which checks that offsets fit shapes
                pass
        except (ValueError, TypeError, LookupError, AttributeError, SafetensorError) as error:
            raise broken from error
    if not whole:
        raise broken
    entries: dict[str, Entry] = {}
    for name, info in header.items():
        if info["dtype"] not in _DTYPES:
            raise UserError(f"{name} in {file} has dtype {info['dtype']}: give a checkpoint in bf16, fp16 or fp32.")
        entries[name] = Entry(file=file, shape=tuple(info["shape"]), dtype=_DTYPES[info["dtype"]])
    return entries
