"""What the same folder is asked again: room on the disk, another device, and the recipe that it saves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from makeweight.errors import UserError
from makeweight.export.folder import MARKER, Folder
from makeweight.job import Job
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe, Tune
from tests.runs import small

NOT_MEASURED = Eval(datasets=(), seqlen=64)
pytestmark = pytest.mark.usefixtures("known_rate")


def test_a_finished_run_needs_no_room(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="mse+e2e", formats=("gptq",))
    done = quantize(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert quantize(recipe) == done
    with pytest.raises(UserError, match="free some space"):
        quantize(replace(recipe, formats=("gptq", "dense")))


def test_a_run_is_finished_where_it_was_begun(llama: Path, text: Path, tmp_path: Path) -> None:
    """Devices differ in the last bits; what is solved can be asked for anything on any device."""
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, tune=Tune(steps=4, device="auto"))
    job = Job.prepare(recipe)
    named = replace(recipe, tune=replace(recipe.tune, device=job.device.type))
    Folder.claim(recipe.out, identity=job.identity(), device="gpu", shards=4)
    with pytest.raises(UserError, match=f"out was begun on gpu, not on {job.device.type}: finish it there, or delete"):
        quantize(recipe)
    (tmp_path / "out" / MARKER).unlink()
    record = quantize(recipe)
    assert quantize(named).digest == record.digest, "auto is the device that was found"
    Folder.check(recipe.out, identity=job.identity(), device="gpu")


def test_the_saved_recipe_is_that_of_the_record(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="rtn")
    quantize(recipe)
    for changed in (
        replace(recipe, formats=("gptq",)),
        replace(recipe, formats=("gptq",), eval=Eval(datasets=(str(text),), seqlen=64, windows=2)),
    ):
        record = quantize(changed)
        again = Recipe.load(tmp_path / "out" / "recipe.json")
        assert again == changed and quantize(again) == record
