"""What the recipes share: where the texts lie, and a JSON file of results that grows cell by cell."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from makeweight.errors import UserError
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "out"
SEQLEN = 2048
WIKITEXT_WINDOWS, ENWIKI_WINDOWS = 12, 6


def data() -> Path:
    """Return the folder of texts, $MAKEWEIGHT_DATA or ../shared/data; raises UserError where it is missing."""
    folder = Path(os.environ.get("MAKEWEIGHT_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not (folder / "enwiki" / "train.txt").is_file():
        raise UserError(f"the texts are not in {folder}: set MAKEWEIGHT_DATA to the folder with enwiki/train.txt.")
    return folder


def evaluation() -> Eval:
    """Return the protocol of all tables: WikiText-2 test (12 windows) and the held-out part of enwiki (6)."""
    texts = (f"{data()}/wikitext2/wiki.test.raw", f"{data()}/enwiki/validation.txt")
    return Eval(datasets=texts, seqlen=SEQLEN, windows=(WIKITEXT_WINDOWS, ENWIKI_WINDOWS), baseline=False)


class Results:
    """A JSON file of cells by name, written after every cell, so that a run resumes where it stopped."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.cells: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def run(self, name: str, recipe: Recipe) -> None:
        """Run one cell unless its result is there, and keep what tables need."""
        if name in self.cells:
            return
        print(f"{self.path.stem}: {name}", file=sys.stderr, flush=True)
        record = quantize(recipe)
        losses = [report.get("error_after") for report in record.blocks]
        self.keep(
            name,
            {
                "method": recipe.method,
                "scheme": str(recipe.scheme),
                "seed": recipe.seed,
                **perplexities(record.perplexities),
                **({"original": perplexities(record.baselines)} if record.baselines else {}),
                "bits_per_weight": round(record.bits_per_weight, 4),
                "solve_seconds": round(record.cost.solve_seconds, 1),
                "peak_memory_mb": round(record.cost.peak_memory_bytes / 1e6),
                "block_errors": [None if loss is None else round(loss, 6) for loss in losses],
                "digest": record.digest,
                "machine": dict(record.machine),
            },
        )
        shutil.rmtree(record.path)

    def keep(self, name: str, cell: Mapping[str, Any]) -> None:
        """Add a cell and write the file, whole or not at all."""
        self.cells[name] = dict(cell)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.cells, indent=1, sort_keys=True) + "\n")
        part.replace(self.path)


def perplexities(results: Any) -> dict[str, float]:
    """Name perplexities by the folder of their text: wikitext2, enwiki."""
    return {Path(result.dataset).parent.name: round(result.perplexity, 4) for result in results}
