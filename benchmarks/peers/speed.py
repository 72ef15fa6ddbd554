"""At equal steps and tokens: ours and auto-round in turn, on the first blocks of the model, several times.

Both learn rounding with sign descent, in 200 steps of 8 samples for each block. Times are those of whole processes,
from their start to the dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.common import Cells
from benchmarks.peers.race import Track
from benchmarks.peers.runs import RUNS, Entry

PAIR = ("autoround", "auto-round")
SETTING = "W3A16g64"


def speed(results: Cells, track: Track, rounds: int) -> None:
    """Run both in turn, so many times each; what an earlier call measured of the same kind stays and counts."""
    for number in range(rounds):
        for name in PAIR:
            entry = Entry(name=f"{track.terms.blocks}-blocks/{name}/{number}", setting=SETTING, run=RUNS[name])
            if entry.name not in results.cells:
                results.keep(entry.name, {"name": name, "blocks": track.terms.blocks, **asdict(track.usage(entry))})


def summary(cells: Mapping[str, Mapping[str, Any]], blocks: int) -> str:
    """Say how our time and memory compare with theirs in each round; each is measured against the run after it."""
    lines = []
    for ours, theirs in zip(*(_of(cells, blocks, name) for name in PAIR), strict=False):
        minutes = " and ".join(f"{cell['wall_seconds'] / 60:.1f}" for cell in (ours, theirs))
        memory = " and ".join(f"{cell['peak_memory_mb'] / 1000:.2f}" for cell in (ours, theirs))
        ratios = [ours[name] / theirs[name] for name in ("wall_seconds", "cpu_seconds")]
        said = "{:.2f} of its time, {:.2f} of its CPU time".format(*ratios)
        lines.append(f"{PAIR[0]} and {PAIR[1]}, {blocks} blocks: {minutes} minutes, {memory} GB; {said}")
    return "\n".join(lines)


def _of(cells: Mapping[str, Mapping[str, Any]], blocks: int, name: str) -> list[Mapping[str, Any]]:
    """Return the cells of one of both in the order of rounds."""
    found = {key: cell for key, cell in cells.items() if (cell["blocks"], cell["name"]) == (blocks, name)}
    return [found[key] for key in sorted(found)]
