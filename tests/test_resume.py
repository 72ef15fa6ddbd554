"""A run may die at any instant: the same recipe goes on where it stopped, and ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from makeweight import pipeline
from makeweight.errors import UserError
from makeweight.export.folder import Folder
from makeweight.export.manifest import check
from makeweight.numerics.scheme import Scheme
from makeweight.paths import MARKER
from makeweight.pipeline import preflight, quantize
from makeweight.recipe import Calib, Eval, Recipe, Tune
from makeweight.report.record import Record
from makeweight.sweep.run import Sweep
from tests.runs import a_text, files, interrupted, kill, same_bits, small, tensors
from tests.tiny import tiny_folder

OTHERS = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
"""Files besides the weights that do not depend on the folder's name and the run's seconds."""
pytestmark = pytest.mark.usefixtures("known_rate")


def unmeasured(model: Path, out: Path, text: Path, **changes: Any) -> Recipe:
    return small(model, out, text, eval=Eval(datasets=(), seqlen=64), **changes)


@pytest.fixture(scope="module")
def straight(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight") / "out"
    quantize(unmeasured(llama, out, text))
    return out


def solved(recipe: Recipe) -> list[int]:
    """Run a recipe and return the blocks that it had to solve."""
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, Sweep, "solve", lambda _, index, *rest: bool(seen.append(index)))
        quantize(recipe)
    return seen


def the_same(ours: Path, other: Path) -> None:
    """Check that two folders hold the same model: tensors first, which say more where they differ, then all bytes."""
    for name, tensor in tensors(ours).items():
        assert same_bits(tensor, tensors(other)[name]), name
    mine, its = files(ours), files(other)
    weights = {name for name in mine if name.endswith(".safetensors")}
    assert weights == {name for name in its if name.endswith(".safetensors")}
    assert [name for name in sorted(weights | OTHERS) if mine[name] != its[name]] == []
    assert not any(name.endswith(".part") for name in mine)
    assert Record.load(ours).digest == Record.load(other).digest


@pytest.mark.parametrize("block", [0, 1, 2])
def test_killed_while_learning(block: int, llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text)
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == block)
    assert not (tmp_path / "out" / "config.json").exists(), "half a model must not load"
    assert solved(recipe) == list(range(block, 3))
    the_same(tmp_path / "out", straight)


@pytest.mark.parametrize("shard", [0, 2, 3])
def test_killed_while_writing(shard: int, llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text)
    interrupted(recipe, Folder, "write", lambda _, index, *rest: index == shard)
    left = tmp_path / "out" / f"model-{shard + 1:05d}-of-00004.part"
    left.write_bytes(b"the first bytes of a shard")
    assert solved(recipe) == list(range(max(0, shard - 1), 3))
    the_same(tmp_path / "out", straight)


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "recipe.json", "config.json"])
def test_killed_while_finishing(file: str, llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text)
    interrupted(recipe, Folder, "write_text", lambda folder, name, *_: name == file and folder.report(3) is not None)
    assert solved(recipe) == []
    the_same(tmp_path / "out", straight)


def test_killed_while_evaluating(llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text)
    interrupted(recipe, pipeline, "measure", lambda *args: True)
    assert solved(recipe) == []
    the_same(tmp_path / "out", straight)


@pytest.mark.parametrize("formats", [(), ("dense",)])
def test_killed_between_the_record_and_the_manifest(
    formats: tuple[str, ...], llama: Path, text: Path, tmp_path: Path
) -> None:
    recipe = small(llama, tmp_path / "out", text, method="rtn")
    if formats:
        quantize(recipe)
    recipe = replace(recipe, formats=formats)
    interrupted(recipe, Folder, "seal", lambda folder: (folder.path / "record.json").exists())
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, pipeline, "measure", lambda *args: True)
        record = quantize(recipe)
    assert record.perplexities and check(tmp_path / "out") == []
    assert Record.load(tmp_path / "out").to_json() == record.to_json()


def test_a_damaged_shard_is_named_and_solved_again(llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text)
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-100], b""):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match=rf"{shard} is not what was written: delete this one file"):
            quantize(recipe)
    shard.unlink()
    assert solved(recipe) == [0, 2]
    the_same(tmp_path / "out", straight)


def test_weights_without_a_manifest_are_measured_again(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, method="rtn")
    quantize(recipe)
    (tmp_path / "out" / "manifest.json").unlink()
    measured: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, pipeline, "measure", lambda *args: measured.append(args) is not None)
        quantize(recipe)
    assert len(measured) == 1 and check(tmp_path / "out") == []


def test_killed_before_the_marker(llama: Path, text: Path, straight: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text)
    interrupted(recipe, Path, "replace", lambda path, *rest: path.name.startswith(MARKER))
    assert solved(recipe) == [0, 1, 2]
    the_same(tmp_path / "out", straight)


@pytest.mark.parametrize("method", ["lwc+cl", "autoround+sde", "lwc+tune+gptq", "gptq", "let+sde", "scale+gptq"])
def test_killed_twice_with_some_blocks_left_out(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text, blocks=(1, 3), method=method)
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    interrupted(recipe, Folder, "write", lambda _, index, *rest: index == 3)
    assert solved(recipe) == [2]
    quantize(replace(recipe, out=str(tmp_path / "straight")))
    the_same(tmp_path / "out", tmp_path / "straight")


def test_killed_after_the_model_has_written(llama: Path, text: Path, tmp_path: Path) -> None:
    calib = Calib(dataset=str(text), nsamples=4, seqlen=24, written=3, piece=12)
    recipe = unmeasured(llama, tmp_path / "out", text, method="lwc+e2e", calib=calib)
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    kept = load_file(tmp_path / "out" / pipeline.WRITTEN)["tokens"]
    assert kept.shape == (6, 12)
    quantize(recipe)
    quantize(replace(recipe, out=str(tmp_path / "straight")))
    the_same(tmp_path / "out", tmp_path / "straight")
    assert not list(tmp_path.glob("*/*.scratch*"))
    given = quantize(replace(recipe, out=str(tmp_path / "given"), calib=replace(calib, written=0)))
    assert given.digest != Record.load(tmp_path / "out").digest


def test_killed_with_codes_of_eight_bits(llama: Path, text: Path, tmp_path: Path) -> None:
    """Their codes lie under the name of the weight, and must not pass for it."""
    recipe = unmeasured(llama, tmp_path / "out", text, method="gptq", scheme=Scheme.parse("W8A8"))
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    assert solved(recipe) == [2]
    quantize(replace(recipe, out=str(tmp_path / "straight")))
    the_same(tmp_path / "out", tmp_path / "straight")


def test_killed_where_norms_are_wider_than_weights(text: Path, tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path / "model", dtype=torch.float16)
    held = tensors(model)
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)) + 1
    held |= {name: values[: len(held[name])].clone() for name in held if "norm" in name}
    save_file(held, model / "model.safetensors", {"format": "pt"})
    recipe = unmeasured(model, tmp_path / "out", text, method="lwc", tune=Tune(steps=4, device="cpu", dtype="float32"))
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    assert solved(recipe) == [2]
    quantize(replace(recipe, out=str(tmp_path / "straight")))
    the_same(tmp_path / "out", tmp_path / "straight")


def test_a_finished_run_that_was_damaged_is_not_called_finished(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = unmeasured(llama, tmp_path / "out", text, method="rtn")
    quantize(recipe)
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    says = refused(recipe, tmp_path / "out")
    assert "model-00002-of-00004.safetensors is damaged" in says and "Delete it and write it again" in says


def test_the_same_recipe_writes_the_same_bytes_and_another_seed_others(
    llama: Path, text: Path, straight: Path, tmp_path: Path
) -> None:
    recipe = unmeasured(llama, tmp_path / "again", text)
    quantize(recipe)
    the_same(tmp_path / "again", straight)
    other = quantize(replace(recipe, seed=1, out=str(tmp_path / "other")))
    assert other.digest != Record.load(straight).digest


def test_a_finished_run_is_not_run_again(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, method="lwc")
    record, before = quantize(recipe), files(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Sweep, "solve"), (Folder, "write"), (pipeline, "measure")):
            kill(patch, owner, name, lambda *args: True)
        assert quantize(recipe) == record
    assert files(tmp_path / "out") == before


def refused(recipe: Recipe, folder: Path) -> str:
    """Check that a run is refused in a sentence and that its folder is left as it was."""
    before = files(folder)
    with pytest.raises(UserError) as caught:
        quantize(recipe)
    assert files(folder) == before
    return str(caught.value)


def test_a_folder_of_another_run(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = unmeasured(llama, out, text, method="lwc")
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    others = {
        "recipe (seed is 0 there and 1 here)": replace(recipe, seed=1),
        'recipe (method is "lwc" there and "lwc+cl" here)': replace(recipe, method="lwc+cl"),
        "recipe (options.lwc.logit is not given there and 3.0 here)": replace(recipe, options={"lwc": {"logit": 3.0}}),
        "recipe (tune.steps is 4 there and 5 here)": replace(recipe, tune=replace(recipe.tune, steps=5)),
        "model, text or version": replace(recipe, model=str(tiny_folder("llama", tmp_path / "other", seed=1))),
    }
    for said, other in others.items():
        assert f"{out} belongs to a run with another {said}" in refused(other, out)
    assert Recipe.load(out / "recipe.json") == recipe, "an unfinished folder says with what it goes on"
    assert solved(recipe) == [2]


def test_a_folder_in_which_the_same_run_is_under_way(llama: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    recipe = unmeasured(llama, tmp_path / "out", text)

    def again(*_: Any) -> bool:
        before = files(tmp_path)
        with pytest.raises(UserError, match="is being written by another run"):
            quantize(recipe)
        assert files(tmp_path) == before
        return True

    interrupted(recipe, Sweep, "solve", again)
    quantize(recipe)


def test_a_folder_whose_text_has_changed(llama: Path, tmp_path: Path) -> None:
    """Half of the blocks on one text and half on another is a model that no recipe describes."""
    words = a_text(tmp_path / "words.txt")
    recipe = unmeasured(llama, tmp_path / "out", words, method="lwc")
    interrupted(recipe, Sweep, "solve", lambda _, index, *rest: index == 2)
    words.write_text(words.read_text()[::-1])
    refused(recipe, tmp_path / "out")


def test_a_folder_of_something_else(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert f"{out} already holds something else" in refused(unmeasured(llama, out, text), out)
    assert "already holds something else" in refused(unmeasured(llama, llama, text), llama)
    with pytest.raises(UserError, match="already holds something else"):
        preflight(unmeasured(llama, out, text))
    (out / "thesis.tex").unlink()
    quantize(unmeasured(llama, out, text, method="rtn"))  # empty by now


def test_evaluating_on_another_text_does_not_solve_again(llama: Path, text: Path, tmp_path: Path) -> None:
    """What a folder is measured on decides none of its bytes, and the record speaks of what was asked for."""
    recipe = small(llama, tmp_path / "out", text, method="lwc")
    quantize(recipe)
    other = replace(recipe, eval=replace(recipe.eval, datasets=(str(a_text(tmp_path / "other.txt", 30)),)))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, Sweep, "solve", lambda *args: True)
        record = quantize(other)
    assert [result.dataset for result in record.perplexities] == list(other.eval.datasets)
