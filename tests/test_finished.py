"""What the same folder is asked again: room on the disk, another device, and the recipe that it saves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from makeweight.errors import UserError
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


def test_another_kind_of_device_is_another_run(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, tune=Tune(steps=4, device="auto"))
    job = Job.prepare(recipe)
    named = Job.prepare(replace(recipe, tune=replace(recipe.tune, device=job.device.type)))
    assert named.identity() == job.identity()
    assert replace(job, device=torch.device("meta")).identity() != job.identity()


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
