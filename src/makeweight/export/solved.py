"""A finished folder of `quantize`, the master copy that every format is written from: no calibration, no solving."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.export import manifest
from makeweight.export.base import Facts
from makeweight.export.folder import OWN
from makeweight.models import packed
from makeweight.models.checkpoint import TEMPLATES
from makeweight.models.shards import Shards, required_json
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from makeweight.paths import MARKER, RECIPE, check_finished, expanded
from makeweight.recipe import Recipe

REPAIR = "Delete it and write it again, or download it again."
"""What helps against a damaged folder."""
NOT_SIDE = (*OWN, "config.json", "*.safetensors", "*.index.json", ".*")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shard in memory: tensors kept as they were, and quantized linears, all by full stored name."""

    kept: dict[str, Tensor]
    quantized: dict[str, QTensor]


class Solved:
    """Reads a solved folder shard by shard. Raises UserError for a folder that is none, unfinished or damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        if not (self.path / MARKER).is_file():
            raise UserError(f"{self.path} is not a folder that `makeweight quantize` wrote: give its --out folder.")
        marker = required_json(self.path / MARKER)
        self.identity = str(marker.get("identity"))
        check_finished(self.path)
        self._check_weights()
        self.recipe = Recipe.load(self.path / RECIPE)
        self.scheme: Scheme = self.recipe.scheme
        self.shards = Shards(self.path)

    def _check_weights(self) -> None:
        """Refuse weights that changed on the disk; a config or a card that its owner edited is passed on."""
        if not (self.path / manifest.NAME).is_file():
            return
        if problems := manifest.check(self.path, kinds=(".safetensors",)):
            raise UserError(f"{self.path} is not what was solved: {' '.join(problems)} {REPAIR}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json without the quantization."""
        config = required_json(self.path / "config.json")
        config.pop("quantization_config", None)
        return config

    @cached_property
    def beside(self) -> str:
        """A hash of what is passed on besides weights, which its owner may edit: config.json and the side files."""
        sha = hashlib.sha256()
        for file in (self.path / "config.json", *self.side_files()):
            sha.update(file.relative_to(self.path).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
        return sha.hexdigest()

    @cached_property
    def ignore(self) -> tuple[str, ...]:
        """The linears that were not quantized."""
        described = required_json(self.path / "config.json").get("quantization_config")
        if not isinstance(described, dict) or "ignore" not in described:
            raise UserError(f"{self.path}/config.json has lost its quantization_config: {REPAIR}")
        return tuple(described["ignore"])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The quantized linears by full name, in the order of `parts`."""
        return tuple(name for file in self.shards.files for name in packed.linears(self._inside(file)))

    def _inside(self, file: Path) -> list[str]:
        return sorted(name for name, entry in self.shards.entries.items() if entry.file == file)

    def parts(self) -> Iterator[Part]:
        """Yield what each shard holds; the first lies outside the blocks, then one per block."""
        for file in self.shards.files:
            stored = dict(self.shards.read_many(self._inside(file)))
            linears = list(packed.linears(stored))
            yield Part(quantized={name: self._take(stored, name) for name in linears}, kept=stored)

    def _take(self, stored: dict[str, Tensor], name: str) -> QTensor:
        """Remove a linear's parts from the stored tensors and return what they stand for."""
        parts = {part: stored.pop(f"{name}.{part}") for part in packed.PARTS if f"{name}.{part}" in stored}
        codes_OI, scale_OG, zero_OG = packed.unpack(parts, (self.scheme.bits,), name)
        return QTensor(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG, scheme=self.scheme)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        found = self.shards.float_dtype(self.config.get("dtype") or self.config.get("torch_dtype"))
        assert found is not None, "norms and embeddings are never quantized"
        return found

    @cached_property
    def facts(self) -> Facts:
        """What formats ask before they promise anything; reads every scale and zero-point once."""
        shapes: dict[str, tuple[int, int]] = {}
        zeros: list[int] = []
        kept: list[str] = []
        fp16 = True
        for part in self.parts():
            kept += part.kept
            for name, tensor in part.quantized.items():
                height, width = tensor.codes_OI.shape
                shapes[name] = (height, width)
                fp16 = fp16 and torch.equal(tensor.scale_OG.half().float(), tensor.scale_OG.float())
                if tensor.zero_OG is not None:
                    zeros += [int(tensor.zero_OG.min()), int(tensor.zero_OG.max())]
        return Facts.of(
            self.config,
            scheme=self.scheme,
            shapes=shapes,
            zeros=(min(zeros), max(zeros)) if zeros else None,
            fp16_scales=fp16,
            folder=self.path,
            kept=tuple(kept),
        )

    def side_files(self) -> list[Path]:
        """Return tokenizer, chat template, generation config and whatever else is no weight."""
        found = sorted([*self.path.iterdir(), *self.path.glob(TEMPLATES)])
        files = (file for file in found if file.is_file())
        return [file for file in files if not any(file.match(pattern) for pattern in NOT_SIDE)]
