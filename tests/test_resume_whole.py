"""A run may die while the whole network learns, and lose a file then: the same recipe ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from makeweight.errors import UserError
from makeweight.export.folder import Folder
from makeweight.job import LEARNED, STATE, Job
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe
from makeweight.report.record import Record
from makeweight.store import Store
from makeweight.sweep.finetune import Finetune
from tests.runs import files, interrupted, small

pytestmark = pytest.mark.usefixtures("known_rate")
SETTINGS = {"steps": 60, "batch_size": 2, "rate": 3e-3, "rounding": True, "rounding_rate": 0.03}
FIRST, SECOND = "model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"
"""The shards of the two blocks that are quantized."""


def a_recipe(model: Path, out: Path, text: Path, **changes: Any) -> Recipe:
    given = {"method": "lwc+e2e", "options": {"e2e": SETTINGS}, "eval": Eval(datasets=(), seqlen=64), **changes}
    return small(model, out, text, **given)


@pytest.fixture(scope="module")
def straight(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight") / "out"
    told = quantize(a_recipe(llama, out, text, blocks=(1, 3))).finetune
    assert told["best_step"] > 0 and told["after"] < told["before"], "else shards are the same before and after"
    return out


def the_same(ours: Path, other: Path) -> None:
    """Check that two folders hold the same shards, and nothing that was set aside."""
    mine, its = ({k: v for k, v in files(at).items() if k.endswith(".safetensors")} for at in (ours, other))
    assert mine.keys() == its.keys()
    assert [name for name in mine if mine[name] != its[name]] == []
    assert Record.load(ours).digest == Record.load(other).digest
    assert not list(ours.glob("*scratch*"))


def killed(recipe: Recipe, owner: type, name: str, call: int) -> None:
    """Run a recipe that dies as something is called the given time."""
    calls = iter(range(1, 10**6))
    interrupted(recipe, owner, name, lambda *_: next(calls) == call)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Finetune, "_learn", 1),
        (Finetune, "_learn", 8),
        (Folder, "set_aside", 2),
        (Store, "refine", 2),
        (Folder, "finish_tuning", 1),
        (Path, "unlink", 2),
    ],
)
def test_killed_on_the_way(
    owner: type, name: str, call: int, llama: Path, text: Path, straight: Path, tmp_path: Path
) -> None:
    recipe = a_recipe(llama, tmp_path / "out", text, blocks=(1, 3))
    killed(recipe, owner, name, call)
    assert not (tmp_path / "out" / "config.json").exists(), "half a model must not load"
    quantize(recipe)
    the_same(tmp_path / "out", straight)


@pytest.mark.parametrize(
    ("owner", "name", "call", "lost"),
    [
        (Store, "refine", 1, FIRST),
        (Store, "refine", 2, SECOND),
        (Store, "refine", 2, LEARNED),
        (Folder, "finish", 1, FIRST),
    ],
)
def test_a_file_that_is_lost_once_shards_hold_what_was_learned(
    owner: type,
    name: str,
    call: int,
    lost: str,
    llama: Path,
    text: Path,
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Blocks behind it were solved behind shards that are gone: all are solved again, and learned on again."""
    recipe, out = a_recipe(llama, tmp_path / "out", text, blocks=(1, 3)), tmp_path / "out"
    killed(recipe, owner, name, call)
    file = out / lost
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file} is not what was written: delete this one file, and the same command"):
        quantize(recipe)
    file.unlink()
    killed(recipe, Path, "unlink", 2)  # dies as it forgets
    capsys.readouterr()
    quantize(recipe)
    assert "Solving 2 blocks will take" in capsys.readouterr().err
    the_same(out, straight)


def test_whose_a_folder_is_comes_before_what_is_damaged_in_it(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe, state = a_recipe(llama, tmp_path / "out", text), tmp_path / "out" / STATE
    killed(recipe, Finetune, "_learn", 30)
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(UserError, match="belongs to a run with another recipe"):
        quantize(replace(recipe, seed=1))
    with pytest.raises(UserError, match=f"{state} is not what was written"):
        quantize(recipe)


def test_what_is_left_is_estimated(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = a_recipe(llama, tmp_path / "out", text)
    whole = Job.prepare(recipe).estimate().seconds
    killed(recipe, Finetune, "_learn", 1)
    begun = Job.prepare(recipe).estimate().seconds
    killed(recipe, Finetune, "_learn", 30)  # two of five states are there
    assert (tmp_path / "out" / STATE).is_file()
    half = Job.prepare(recipe).estimate().seconds
    killed(recipe, Store, "refine", 2)
    learned = Job.prepare(recipe).estimate().seconds
    assert whole > begun > half > learned


def test_one_shard_is_enough_while_the_network_learns(llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    """Shards are as they were solved until then: only what is lost is made again."""
    recipe = a_recipe(llama, tmp_path / "out", text, blocks=(1, 3))
    killed(recipe, Finetune, "_learn", 30)
    (tmp_path / "out" / FIRST).unlink()
    kept = tmp_path / "out" / SECOND
    before = kept.stat().st_mtime_ns
    killed(recipe, Finetune, "_learn", 1)
    assert kept.stat().st_mtime_ns == before
    quantize(recipe)
    the_same(tmp_path / "out", straight)
