"""What benchmarks and recipes share: where the texts lie, and a JSON file of results that grows cell by cell."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from makeweight.errors import UserError
from makeweight.paths import locked
from makeweight.recipe import Eval

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("MAKEWEIGHT_RESULTS") or ROOT / "benchmarks" / "results").resolve()
"""What lies there is not run again; another folder begins anew."""
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


def second_half(text: Path, folder: Path) -> Path:
    """Write what follows the middle of a text to FOLDER/<its folder>/<its name>, and return that; it begins a line."""
    content = text.read_text(encoding="utf-8")
    out = folder / text.parent.name / text.name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(content[content.find("\n", len(content) // 2) + 1 :], encoding="utf-8")
    return out


class Cells:
    """A JSON file of cells by name, written after every cell, so that a run resumes where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def keep(self, name: str, cell: Mapping[str, Any]) -> None:
        """Add a cell to what the file holds by now, and write it, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent, wait=True):
            self.cells = {**self._read(), name: dict(cell)}
            write_json(self.path, self.cells)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def divergences(results: Any) -> dict[str, float]:
    """Name divergences from the original, in nats, by the folder of their text; empty where none was measured."""
    compared = [result for result in results if result.divergence is not None]
    return {Path(result.dataset).parent.name: round(result.divergence, 5) for result in compared}


def perplexities(results: Any) -> dict[str, float]:
    """Name perplexities by the folder of their text: wikitext2, enwiki."""
    return {Path(result.dataset).parent.name: round(result.perplexity, 4) for result in results}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
