"""Equal steps, in turn: the model that both get, what is run again, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Cells
from benchmarks.peers.__main__ import parse
from benchmarks.peers.child import BrokenRunError
from benchmarks.peers.material import first_blocks
from benchmarks.peers.runs import RUNS, Entry
from benchmarks.peers.speed import PAIRS, Pair, speed, summary
from tests.tiny import tiny_folder


def test_the_first_blocks_are_a_model(tmp_path: Path) -> None:
    source = tiny_folder("llama", tmp_path / "source")
    cut = AutoModelForCausalLM.from_pretrained(first_blocks(source, 2, tmp_path / "cut"), dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    del whole.model.layers[2:]
    tokens_BT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(cut(tokens_BT, use_cache=False).logits, whole(tokens_BT, use_cache=False).logits)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_both_run_in_turn_and_whole_rounds_stay(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.speed.processor", lambda: "a fast one")
    ran: list[str] = []
    assert pair.setting in RUNS[pair.ours].settings and pair.setting in RUNS[pair.theirs].settings

    def took(entry: Entry) -> dict[str, Any]:
        ran.append(entry.name)
        if len(ran) == 4:
            raise BrokenRunError("killed")
        seconds = 60.0 if entry.name.endswith(f"-{pair.ours}") else 120.0
        return {"wall_seconds": seconds, "cpu_seconds": 2 * seconds, "peak_memory_mb": 1000}

    track = cast(Any, SimpleNamespace(terms=SimpleNamespace(blocks=2, threads=1), took=took))
    results = Cells(tmp_path / "speed.json")
    with pytest.raises(BrokenRunError):
        speed(results, track, 2, pair)
    speed(results, track, 2, pair)
    kind, ours, theirs = f"{pair.mark}2-blocks-1-threads", pair.ours, pair.theirs
    order = [ours, theirs, theirs, ours, theirs, ours]
    assert ran == [f"{kind}-{name}" for name in order], "a round is run again as a whole"
    took_both = "1.0 and 2.0 minutes, 1.00 and 1.00 GB; 0.50 of its time, 0.50 of its CPU time"
    said = summary(results.cells, track, pair).splitlines()
    assert said == [f"{ours} and {theirs}, {kind}/{number} on a fast one: {took_both}" for number in range(2)]
    others = [summary(results.cells, track, other) for other in PAIRS.values() if other != pair]
    assert others == ["", ""]
    track.terms.threads = 2
    assert summary(results.cells, track, pair) == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--speed 0", "--speed takes a number of rounds"),
        ("--speed 1 --smoke", "--speed takes a number of rounds"),
        ("--speed 2 --runs hqq", "--speed takes a number of rounds"),
        ("--speed 1 --blocks 31", "give --blocks a number from 1 to 30"),
        ("--pair best", "--pair is of --speed"),
    ],
)
def test_what_speed_does_not_take(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(line.split())
    assert says in capsys.readouterr().err.splitlines()[-1]
