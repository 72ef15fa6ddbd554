"""Ours and auto-round in turn, on the first blocks of the model, several times: what each takes on one machine.

`equal` is learned rounding with sign descent in both, in 200 steps of 8 whole samples for each block; the others are an
effort of ours and the recipe of theirs that it is to be no slower than. Times are those of whole processes, from their
start to the dense weights: what ours does once, writing samples and the loss at the head, weighs more on a few blocks
than on the whole model. A round, in which who begins changes with each, is kept as a whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Cells
from benchmarks.peers.race import Track
from benchmarks.peers.runs import RUNS, Entry
from benchmarks.processor import processor


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs of the race that are compared in one setting."""

    ours: str
    theirs: str
    setting: str
    mark: str = ""
    """What stands before the rounds' names in the results."""

    def kind(self, track: Track) -> str:
        """Name what rounds must share to be compared, but for the machine."""
        return f"{self.mark}{track.terms.blocks}-blocks-{track.terms.threads}-threads"


PAIRS = {
    "equal": Pair(ours="autoround", theirs="auto-round", setting="W3A16g64", mark="equal-"),
    "default": Pair(ours="makeweight-default", theirs="auto-round", setting="W2A16g64", mark="default-"),
    "best": Pair(ours="makeweight-best", theirs="auto-round-best", setting="W2A16g64", mark="best-"),
}


def speed(results: Cells, track: Track, rounds: int, pair: Pair = PAIRS["equal"]) -> None:
    """Run both in turn, so many times each; rounds that are there, of as many blocks and threads, stay."""
    kind = pair.kind(track)
    for number in range(rounds):
        key = f"{kind}/{number}"
        if key in results.cells:
            continue
        load, cell = os.getloadavg()[0], {}
        for name in (pair.ours, pair.theirs) if number % 2 == 0 else (pair.theirs, pair.ours):
            cell[name] = track.took(Entry(name=f"{kind}-{name}", setting=pair.setting, run=RUNS[name]))
        about = {"load_before": round(load, 1), "processor": processor(), "setting": pair.setting}
        results.keep(key, {**about, **cell})


def summary(cells: Mapping[str, Mapping[str, Any]], track: Track, pair: Pair = PAIRS["equal"]) -> str:
    """Say how our time and memory compare with theirs in each round."""
    lines = []
    for key in sorted(key for key in cells if key.startswith(f"{pair.kind(track)}/")):
        ours, theirs = cells[key][pair.ours], cells[key][pair.theirs]
        minutes = " and ".join(f"{one['wall_seconds'] / 60:.1f}" for one in (ours, theirs))
        memory = " and ".join(f"{one['peak_memory_mb'] / 1000:.2f}" for one in (ours, theirs))
        ratios = [ours[name] / theirs[name] for name in ("wall_seconds", "cpu_seconds")]
        said = "{:.2f} of its time, {:.2f} of its CPU time".format(*ratios)
        where = f" on {found}" if (found := cells[key].get("processor")) else ""
        lines.append(f"{pair.ours} and {pair.theirs}, {key}{where}: {minutes} minutes, {memory} GB; {said}")
    return "\n".join(lines)
