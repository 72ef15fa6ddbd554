"""What a run leaves behind besides the model: what was asked, what it gave, what it cost. JSON both ways."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from makeweight import __version__
from makeweight.evals.perplexity import Perplexity
from makeweight.numerics.precision import name_of
from makeweight.recipe import Recipe

FILE = "record.json"
BROKEN, POOR, CLOSE = 2.0, 1.2, 1.05
"""Ratios of perplexities above which a model is called broken, noticeably worse, somewhat worse."""
BROKEN_TOP, POOR_TOP, CLOSE_TOP = 0.4, 0.7, 0.9
"""The same for shares of next tokens that are the original's, below: perplexity may also fall by luck."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of solving and of evaluating, and the peak resident memory of the process (GPU: of its allocator)."""

    solve_seconds: float
    evaluate_seconds: float
    peak_memory_bytes: int
    peak_gpu_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished run."""

    recipe: dict[str, Any]
    path: str
    digest: str
    bits_per_weight: float
    file_bytes: int
    source_bytes: int
    perplexities: tuple[Perplexity, ...]
    baselines: tuple[Perplexity, ...]
    blocks: tuple[Mapping[str, Any], ...]
    cost: Cost
    exports: tuple[Mapping[str, Any], ...] = ()
    finetune: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    source_bits: int = 16

    @property
    def method(self) -> str:
        """Return the method string of the recipe."""
        return str(self.recipe["method"])

    def verdict(self) -> str:
        """Say in plain words what the model lost; empty where nothing was measured against the original."""
        before = {result.dataset: result for result in self.baselines}
        pairs = [(result, before[result.dataset]) for result in self.perplexities if result.dataset in before]
        if not pairs:
            return ""
        if broken := [first.dataset for _, first in pairs if not math.isfinite(first.perplexity)]:
            return f"Nothing can be said of this model: the original itself has no finite perplexity on {broken[0]}."
        worst, original = max(pairs, key=_ratio)
        ratio = _ratio((worst, original))
        where = f"perplexity on {worst.dataset} went from {original.perplexity:.2f} to {worst.perplexity:.2f}"
        tops = [(result.same_top, result.dataset) for result, _ in pairs if result.same_top is not None]
        same, least = min(tops, key=lambda top: (top[0], top[1] != worst.dataset), default=(1.0, worst.dataset))
        if tops:
            there = "" if least == worst.dataset else f"on {least} "
            where += f", and {there}the likeliest next token is the original's {100 * same:.0f} % of the time"
        if ratio >= BROKEN or same < BROKEN_TOP:
            return f"This model is broken: {where}. Use more bits, smaller groups or a stronger method."
        if ratio > POOR or same < POOR_TOP:
            return f"This model is noticeably worse than the original: {where}."
        if ratio > CLOSE or same < CLOSE_TOP:
            return f"This model is somewhat worse than the original: {where}."
        return f"This model stays close to the original: {where}."

    def to_json(self) -> str:
        """Return the record as indented JSON with sorted keys; numbers that are not finite are null."""
        return json.dumps(_finite(asdict(self)), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Record:
        """Read the record of a finished folder; raises OSError, ValueError, KeyError or TypeError for what is none."""
        data = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        for name in ("perplexities", "baselines"):
            data[name] = tuple(_perplexity(item) for item in data[name])
        return cls(
            **{**data, "blocks": tuple(data["blocks"]), "exports": tuple(data["exports"]), "cost": Cost(**data["cost"])}
        )


def _finite(value: Any) -> Any:
    """Replace numbers that JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _perplexity(item: Mapping[str, Any]) -> Perplexity:
    """Read a result; what was not finite counts as infinite."""
    infinite = {name: math.inf for name in ("perplexity", "nll") if item[name] is None}
    return Perplexity(**{**item, **infinite})


def _ratio(pair: tuple[Perplexity, Perplexity]) -> float:
    """Return after / before, infinite where what is after is not a number."""
    ratio = pair[0].perplexity / pair[1].perplexity
    return math.inf if math.isnan(ratio) else ratio


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Describe what a run ran on, and in which dtype it learned."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "dtype": name_of(dtype),
        "torch": torch.__version__,
        "makeweight": __version__,
    }


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data."""
    return json.loads(recipe.to_json())


def totals(reports: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """Return one digest of the codes of all blocks, and the mean bits of their weights."""
    digest = hashlib.sha256(json.dumps([report["digest"] for report in reports], sort_keys=True).encode()).hexdigest()
    sizes = [size for report in reports for size in report["bits"].values()]
    return digest, sum(bits * count for bits, count in sizes) / sum(count for _, count in sizes)


def seconds_of(*reports: Mapping[str, Any] | None) -> float:
    """Return the sum of the seconds that reports name, where there are any."""
    return sum(report.get("seconds", 0.0) for report in reports if report is not None)
