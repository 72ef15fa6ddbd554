"""Equal steps, in turn: the model that both get, what is run again, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Cells
from benchmarks.peers.child import Usage
from benchmarks.peers.material import first_blocks
from benchmarks.peers.runs import Entry
from benchmarks.peers.speed import PAIR, speed, summary
from tests.tiny import tiny_folder


def test_the_first_blocks_are_a_model(tmp_path: Path) -> None:
    source = tiny_folder("llama", tmp_path / "source")
    cut = AutoModelForCausalLM.from_pretrained(first_blocks(source, 2, tmp_path / "cut"), dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    del whole.model.layers[2:]
    tokens_BT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(cut(tokens_BT, use_cache=False).logits, whole(tokens_BT, use_cache=False).logits)


def test_both_run_in_turn_and_what_is_there_stays(tmp_path: Path) -> None:
    ran: list[str] = []

    def usage(entry: Entry) -> Usage:
        ran.append(entry.name)
        seconds = 60.0 if PAIR[0] in entry.name.split("/") else 120.0
        return Usage(wall_seconds=seconds, cpu_seconds=2 * seconds, peak_memory_mb=1000)

    track = cast(Any, SimpleNamespace(terms=SimpleNamespace(blocks=2), usage=usage))
    results = Cells(tmp_path / "speed.json")
    speed(results, track, 1)
    speed(results, track, 2)
    assert ran == [f"2-blocks/{name}/{number}" for number in range(2) for name in PAIR]
    said = summary(results.cells, 2).splitlines()
    took = "1.0 and 2.0 minutes, 1.00 and 1.00 GB; 0.50 of its time, 0.50 of its CPU time"
    assert said == [f"autoround and auto-round, 2 blocks: {took}"] * 2
    assert summary(results.cells, 3) == ""
