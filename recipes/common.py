"""What the recipes share: a JSON file of results, and what becomes a cell of it."""

from __future__ import annotations

import argparse
import shutil
import sys

from benchmarks.common import RESULTS, Cells, divergences, perplexities
from makeweight.errors import UserError
from makeweight.pipeline import quantize
from makeweight.plan import parts_of
from makeweight.recipe import Recipe


def asked(about: str | None, names: str = "") -> list[str]:
    """Read a recipe's command line: --help, and methods where `names` says what they are called."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if names:
        parser.add_argument("words", nargs="*", metavar=names, help="all where none is given")
    words: list[str] = vars(parser.parse_args()).get("words", [])
    for word in words:
        try:
            parts_of(word)
        except UserError as error:
            parser.error(str(error))
    return words


class Results(Cells):
    """The file benchmarks/results/NAME.json."""

    def __init__(self, name: str) -> None:
        super().__init__(RESULTS / f"{name}.json")

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
                **({"divergence": found} if (found := divergences(record.perplexities)) else {}),
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
