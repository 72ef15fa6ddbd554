"""At equal steps and tokens: ours and auto-round in turn, on the first blocks of the model, several times.

Both learn rounding with sign descent, in 200 steps of 8 samples for each block. Times are those of whole processes,
from their start to the dense weights. A round, in which who begins changes with each, is kept as a whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from benchmarks.common import Cells
from benchmarks.peers.race import Track
from benchmarks.peers.runs import RUNS, Entry

OURS, THEIRS = "autoround", "auto-round"
SETTING = "W3A16g64"


def speed(results: Cells, track: Track, rounds: int) -> None:
    """Run both in turn, so many times each; rounds that are there, of as many blocks and threads, stay."""
    for number in range(rounds):
        key = f"{_kind(track)}/{number}"
        if key in results.cells:
            continue
        load, cell = os.getloadavg()[0], {}
        for name in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            cell[name] = track.took(Entry(name=f"{_kind(track)}-{name}", setting=SETTING, run=RUNS[name]))
        results.keep(key, {"load_before": round(load, 1), "setting": SETTING, **cell})


def summary(cells: Mapping[str, Mapping[str, Any]], track: Track) -> str:
    """Say how our time and memory compare with theirs in each round."""
    lines = []
    for key in sorted(key for key in cells if key.startswith(f"{_kind(track)}/")):
        ours, theirs = cells[key][OURS], cells[key][THEIRS]
        minutes = " and ".join(f"{one['wall_seconds'] / 60:.1f}" for one in (ours, theirs))
        memory = " and ".join(f"{one['peak_memory_mb'] / 1000:.2f}" for one in (ours, theirs))
        ratios = [ours[name] / theirs[name] for name in ("wall_seconds", "cpu_seconds")]
        said = "{:.2f} of its time, {:.2f} of its CPU time".format(*ratios)
        lines.append(f"{OURS} and {THEIRS}, {key}: {minutes} minutes, {memory} GB; {said}")
    return "\n".join(lines)


def _kind(track: Track) -> str:
    """Name what rounds must share to be compared, but for the machine."""
    return f"{track.terms.blocks}-blocks-{track.terms.threads}-threads"
