"""The race without racing: which cells there are, what is run again, what counts as on the grid, and the table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import ROOT, Cells, second_half
from benchmarks.peers import child
from benchmarks.peers.child import BrokenRunError
from benchmarks.peers.judge import check_grid, most_values
from benchmarks.peers.programs import RUNNERS
from benchmarks.peers.race import is_left, race
from benchmarks.peers.runs import ORIGINAL, OURS, RUNS, THEIRS, Entry, Run, entries
from benchmarks.peers.table import markdown
from benchmarks.processor import processor
from makeweight.errors import UserError
from makeweight.export.run import export_model
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe
from tests.tiny import tiny_folder


def test_cells_alternate_and_have_plain_names() -> None:
    found = entries()
    assert found[0].name == ORIGINAL and found[0].run is None
    names = [entry.name for entry in found]
    assert len(set(names)) == len(names)
    first, second = next(iter(OURS)), next(iter(THEIRS))
    assert names[1:3] == [f"W4A16/{first}", f"W4A16/{second}"]
    assert [name for name in names if name.endswith("/auto-round-best")] == ["W2A16g64/auto-round-best"]
    assert [entry.name for entry in entries(["w3a16G64"], ["hqq"])] == [ORIGINAL, "W3A16g64/hqq"]


@pytest.mark.parametrize(
    ("settings", "chosen", "says"),
    [
        (["W3A16g64"], ["hqqq"], "did you mean 'hqq'"),
        (["W3A16g64_sym"], [], "not raced"),
        (["W4A16"], ["auto-round-best"], "no run is left"),
        (["W9"], [], "not"),
    ],
)
def test_what_cannot_be_raced(settings: list[str], chosen: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        entries(settings, chosen)


def test_every_run_ends_after_two_steps_when_shortened() -> None:
    for name, run in RUNS.items():
        short = run.shortened()
        steps = {short.get("iters"), short.get("tune", {}).get("steps")} - {None}
        assert steps <= {2}, name
        assert steps or run.program in ("hqq", "llm-compressor", "gptqmodel"), name
        if "e2e" in short.get("method", "").split("+"):
            assert short["options"]["e2e"]["steps"] == 2, name
        assert short.get("calib", {}).get("written", 0) <= 2, name


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def fill(entry: Entry) -> dict[str, Any]:
        ran.append(entry.name)
        if entry.name == "b":
            raise BrokenRunError("its last words")
        return {"wikitext2": 1.0}

    chosen, file = [Entry(name=name) for name in "abc"], tmp_path / "peers.json"
    Cells(file).keep("a", {"wikitext2": 2.0})
    cleared: list[tuple[str, bool]] = []
    race(Cells(file), chosen, fill, clear=lambda entry: cleared.append((entry.name, entry.name in Cells(file).cells)))
    assert ran == ["b", "c"]
    assert cleared == [("c", True)], "what a run wrote is deleted only once its cell is kept"
    kept = json.loads(file.read_text())
    assert kept == {"a": {"wikitext2": 2.0}, "b": {"error": "its last words"}, "c": {"wikitext2": 1.0}}
    race(Cells(file), chosen, fill)
    assert ran == ["b", "c"]
    race(Cells(file), chosen, fill, retry=True)
    assert ran == ["b", "c", "b"]


def test_only_what_this_very_job_left_is_gone_on_with(tmp_path: Path) -> None:
    job = {"bits": 2, "options": {"method": "rtn"}}
    assert not is_left(tmp_path / "none", job)
    (tmp_path / "job.json").write_text(json.dumps(job, indent=1))
    assert is_left(tmp_path, job) and not is_left(tmp_path, {**job, "bits": 3})


def test_a_cell_of_other_options_is_named_and_waits_for_retry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = Run(program="hqq", options={"steps": 2}), tmp_path / "peers.json"
    Cells(file).keep("a", {"options": {"steps": 1}})
    Cells(file).keep("b", {"options": {"steps": 2}})
    chosen = [Entry(name=name, run=run) for name in "ab"]
    race(Cells(file), chosen, lambda _: {"wikitext2": 1.0})
    assert capsys.readouterr().err == "a is there with other options: --retry runs it again.\n"
    race(Cells(file), chosen, lambda _: {"wikitext2": 1.0}, retry=True)
    assert list(Cells(file).cells.values()) == [{"wikitext2": 1.0}, {"options": {"steps": 2}}]


def test_two_runs_can_fill_the_same_file(tmp_path: Path) -> None:
    first, second = Cells(tmp_path / "cells.json"), Cells(tmp_path / "cells.json")
    first.keep("a", {"wikitext2": 1.0})
    second.keep("b", {"wikitext2": 2.0})
    assert set(Cells(tmp_path / "cells.json").cells) == set(second.cells) == {"a", "b"}
    assert [file.name for file in tmp_path.iterdir()] == ["cells.json"]


@pytest.mark.parametrize("group_size", [8, -1])
def test_values_are_counted_group_by_group(group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 32 if group_size == -1 else group_size
    codes_OGS = torch.randint(4, (6, 32 // size, size), generator=generator)
    codes_OGS[..., :4] = torch.arange(4)
    scale_OG1 = torch.rand(6, 32 // size, 1, generator=generator) + 0.1
    weight_OI = ((codes_OGS - 1.3) * scale_OG1).flatten(1)
    assert most_values(weight_OI, group_size) == 4
    assert most_values(weight_OI.bfloat16(), group_size) == 4
    weight_OI[3, 5] += 0.01
    assert most_values(weight_OI, group_size) == 5


def test_a_folder_is_held_to_the_grid(tmp_path: Path) -> None:
    source, scheme = tiny_folder("llama", tmp_path / "source", dtype=torch.bfloat16), Scheme.parse("W3A16g32")
    solved = tmp_path / "solved"
    quantize(Recipe(model=str(source), out=str(solved), method="rtn", scheme=scheme, eval=Eval(datasets=(), seqlen=64)))
    written = export_model(solved, ["dense"], out=tmp_path)[0].path
    dense, original = open_checkpoint(written), open_checkpoint(source)
    found = check_grid(dense, original, bits=3, group_size=32)
    assert found == {"allowed": 8, "most_values": 8, "also_changed": []}
    with pytest.raises(ValueError, match="2 bits allow 4"):
        check_grid(dense, original, bits=2, group_size=32)
    with pytest.raises(ValueError, match="different values"):
        check_grid(original, original, bits=3, group_size=32)
    file = written / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.input_layernorm.weight"][0] += 1
    save_file(weights, file, {"format": "pt"})
    changed = check_grid(open_checkpoint(written), original, bits=3, group_size=32)["also_changed"]
    assert changed == ["input_layernorm.weight"]
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="is not quantized here and was changed"):
        check_grid(open_checkpoint(written), original, bits=3, group_size=32)


def test_weights_are_handed_over_in_the_dtypes_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RUNNERS))
    handover = importlib.import_module("handover")
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "model" / "model.safetensors")
    job = {"model": str(tmp_path / "model"), "out": str(tmp_path), "dtype": "float32"}
    model = torch.nn.Linear(3, 2, dtype=handover.dtype(job))  # its bias is none of the original's
    handover.save(model, job)
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert written.keys() == {"weight"} and torch.equal(written["weight"], model.weight.bfloat16())
    assert handover.dtype({**job, "dtype": "auto"}) == "auto"


def test_the_second_half_of_a_text_begins_with_a_line(tmp_path: Path) -> None:
    text = tmp_path / "enwiki" / "validation.txt"
    text.parent.mkdir()
    text.write_text("one é\ntwo\nthree\nfour\n")
    later = second_half(text, tmp_path / "later")
    assert later == tmp_path / "later" / "enwiki" / "validation.txt" and later.read_text() == "four\n"


def test_a_process_is_measured_and_its_last_words_kept(tmp_path: Path) -> None:
    log, env = tmp_path / "log", child.environment(1)
    used = child.run([sys.executable, "-c", "import time; time.sleep(1)"], cwd=tmp_path, log=log, env=env)
    assert used.wall_seconds >= 1 > used.cpu_seconds and 1 <= used.peak_memory_mb < 10_000
    busy = "import time; full = bytearray(200_000_000)\nwhile time.process_time() < 1: pass"
    used = child.run([sys.executable, "-c", busy], cwd=tmp_path, log=log, env=env)
    assert used.cpu_seconds >= 1 and 200 <= used.peak_memory_mb < 10_000
    broken = "print('10 %\\r20 %\\rdone'); raise SystemExit('no such grid')"
    with pytest.raises(BrokenRunError, match=r"exit code 1\ndone\nno such grid"):
        child.run([sys.executable, "-u", "-c", broken], cwd=tmp_path, log=log, env=env)


def test_the_one_that_measures_stays_small() -> None:
    code = "import sys, benchmarks.peers.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_table() -> None:
    apart = {"divergence": {"wikitext2": 0.5, "enwiki": 0.25}}
    later = {"later": {"perplexities": {"wikitext2": 20.0, "enwiki": 5.0}}}
    cost = {"wall_seconds": 90.0, "cpu_seconds": 150.0, "peak_memory_mb": 1234, "threads": 2, "processor": "fast"}
    cell = {"setting": "W2A16g64", "version": "1.2", "calibration": "128 x 512 tokens, abc", **cost}
    cells = {
        ORIGINAL: {"wikitext2": 20.0, "enwiki": 15.0, "later": {"perplexities": {"wikitext2": 10.0, "enwiki": 5.0}}},
        "W2A16g64/hqq": {**cell, "program": "hqq", "wikitext2": 40.0, "enwiki": 15.0},
        "W2A16g64/lwc": {**cell, "program": "makeweight", "wikitext2": 30.0, "enwiki": 18.0, **apart, **later},
        "W2A16g64/auto-round": {"setting": "W2A16g64", "program": "auto-round", "error": "no such grid"},
    }
    lines = markdown(cells).splitlines()
    assert lines[2] == "| original |  | 20.00 | 15.00 | - | - | - | - | - | - | - |"
    gaps = "0.405 | 0.182 | 0.693 / 0.000"
    assert lines[3] == f"| `lwc` | makeweight 1.2 | 30.00 | 18.00 | {gaps} | 0.500 / 0.250 | 1.5 | 2.5 | 1.2 |"
    assert lines[4].startswith("| `auto-round` | auto-round (failed) | - |")
    assert lines[5] == "| `hqq` | hqq 1.2 | 40.00 | 15.00 | 0.693 | 0.000 | - | - | 1.5 | 2.5 | 1.2 |"
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert "128 x 512 tokens; threads: 2" in markdown(cells)
    (missing,) = (line for line in markdown(cells).splitlines() if line.startswith("- Not run yet at W2A16g64: "))
    assert "`auto-round-best`" in missing and "`lwc+sde+cl`" in missing and "`lwc`," not in missing
    assert all("auto-round-best" not in line for line in markdown(cells).splitlines() if "yet at W4A16" in line)


def test_minutes_are_of_one_processor() -> None:
    cost = {"wall_seconds": 90.0, "cpu_seconds": 150.0, "peak_memory_mb": 1234, "threads": 2}
    cell = {"setting": "W2A16g64", "version": "1.2", "calibration": "128 x 512 tokens, abc", "program": "hqq", **cost}
    shared = {**cell, "wikitext2": 40.0, "enwiki": 15.0}
    cells = {ORIGINAL: {"wikitext2": 20.0, "enwiki": 15.0}, "W2A16g64/hqq": shared, "W2A16g64/lwc": dict(shared)}
    assert "Minutes of `hqq`, `lwc` at W2A16g64 left out" in markdown(cells) and "Minutes at" not in markdown(cells)
    cells["W2A16g64/hqq"] = {
        **shared,
        "processor": "fast",
        "note": "its note",
        "grid": {"also_changed": ["norm.weight"]},
    }
    said = markdown(cells)
    assert "- Minutes at W2A16g64 are of fast, 2 threads." in said and "- `hqq`: its note." in said
    assert "- Besides linears, `hqq` changed `norm.weight`.\n- Of `lwc` it is not recorded" in said
    assert "Minutes of `lwc` at W2A16g64 left out: of another or an unknown processor, or" in said
    assert "| 0.000 | - | - | - | - | 1.2 |" in said and "| 0.000 | - | - | 1.5 | 2.5 | 1.2 |" in said
    cells["W2A16g64/lwc"]["processor"] = "fast"
    assert "left out" not in markdown(cells)
    cells["W2A16g64/lwc"] |= {"threads": 4, "grid": {"also_changed": []}}
    assert "Minutes of `lwc` at W2A16g64 left out" in markdown(cells) and "recorded" not in markdown(cells)
    cells["W2A16g64/lwc"]["threads"] = 2
    cells["W2A16g64/rtn"] = {**shared, "processor": "slow"}
    assert "Minutes of `rtn` at W2A16g64 left out" in markdown(cells)
    cells["W2A16g64/lwc"]["resumed"] = True
    assert "Minutes of `lwc`, `rtn` at W2A16g64 left out" in markdown(cells)
    cells["W4A16/hqq"] = {**cells["W2A16g64/hqq"], "setting": "W4A16", "note": "its older note"}
    assert "- `hqq` at W2A16g64: its note.\n- `hqq` at W4A16: its older note." in markdown(cells)


def test_a_processor_is_named_by_what_multiplies(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    first = (
        "processor\t: 0\nmodel name\t: Some CPU\ncpu family\t: 26\nmodel\t\t: 2\nflags\t\t: avx2 avx512f avx512_bf16\n"
    )
    info.write_text(f"{first}\n{first.replace(' avx512_bf16', '')}")
    assert processor(info) == "Some CPU (26/2, avx512_bf16)"
    assert processor(tmp_path / "none") == ""
