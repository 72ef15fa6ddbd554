"""Write the README's tables from the JSON files of results.

python -m recipes.tables
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import RESULTS, ROOT, table
from benchmarks.peers.table import DOMAINS, markdown
from recipes import hosts
from recipes.ablation import BLOCKS, CALIB, METHODS, TUNE
from recipes.common import asked

START, END = "<!-- results -->", "<!-- /results -->"
Cells = dict[str, dict[str, Any]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, and the spread (largest minus smallest) where there are several seeds."""
    mean, width = statistics.fmean(values), max(values) - min(values)
    return f"{mean:.{digits}f}" + (f" ({width:.{digits}f})" if len(values) > 1 else "")


def core(cells: Cells) -> str:
    """Return the table of the whole model."""
    rows = []
    if original := next((cell["original"] for cell in cells.values() if "original" in cell), None):
        rows.append(["original", f"{original['wikitext2']:.2f}", f"{original['enwiki']:.2f}", "-", "-", "16", "", ""])
    for method in METHODS:
        for cell in (cell for cell in cells.values() if cell["method"] == method):
            minutes, memory = cell["solve_seconds"] / 60, cell["peak_memory_mb"] / 1000
            rows.append(
                [
                    f"`{method}`", f"{cell['wikitext2']:.2f}", f"{cell['enwiki']:.2f}",
                    *(_divergence([cell], name) for name in DOMAINS),
                    f"{cell['bits_per_weight']:.2f}", f"{minutes:.1f}", f"{memory:.1f}",
                ]
            )  # fmt: skip
    names = DOMAINS.values()
    columns = (
        *names,
        *(f"KL {name}" for name in names),
        "bits per weight",
        "minutes of solving",
        "peak GB with evaluation",
    )
    return table(("whole model, W3A16g64", *columns), rows)


def ablation(cells: Cells) -> str:
    """Return one table per scheme: mean over seeds, spread in brackets."""
    parts = []
    for scheme in dict.fromkeys(cell["scheme"] for cell in cells.values()):
        rows = []
        for method in METHODS:
            found = [c for c in cells.values() if c["scheme"] == scheme and c["method"] == method]
            if found:
                seeds = str(len(found)) if method != "rtn" else "-"
                domains = [spread([cell[name] for cell in found]) for name in DOMAINS]
                rows.append([f"`{method}`", *domains, *(_divergence(found, name) for name in DOMAINS), seeds])
        names = DOMAINS.values()
        header = (f"first 8 blocks, {scheme}", *names, *(f"KL {name}" for name in names), "seeds")
        parts.append(table(header, rows))
    return "\n\n".join([protocol(), *parts])


def _divergence(cells: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return the spread of the divergences from the original's predictions, a dash where one was not measured."""
    found = [cell.get("divergence", {}).get(name) for cell in cells]
    return "-" if None in found else spread(found, digits=4)


def protocol() -> str:
    """Return what the tables of the first blocks were made with."""
    return (
        f"Blocks {BLOCKS[0]} to {BLOCKS[1] - 1} alone, the others at 16 bits: {CALIB['nsamples']} x "
        f"{CALIB['seqlen']} tokens of calibration, {TUNE.steps} steps of {TUNE.batch_size} samples for each block. In "
        "brackets is the largest minus the smallest of the seeds. KL is the divergence from the original's "
        "predictions, nats for each token, 0 where nothing is lost."
    )


def main() -> None:
    """Put the tables between the marks in README.md."""
    asked(__doc__)
    parts = []
    for name, build in (("peers", markdown), ("core", core), ("ablation", ablation), ("hosts", hosts.tables)):
        file = RESULTS / f"{name}.json"
        if file.is_file():
            parts.append(build(json.loads(file.read_text())))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n{chr(10).join(f'{part}{chr(10)}' for part in parts)}{END}{after}")


if __name__ == "__main__":
    main()
