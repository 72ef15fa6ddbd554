"""A folder belongs to one run, and each of its files is whole or absent."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.export import folder as folder_module
from makeweight.export import manifest
from makeweight.export.claim import Claimant, another
from makeweight.export.folder import Folder
from makeweight.export.solved import Solved
from makeweight.models.load import open_checkpoint
from makeweight.models.shards import INDEX
from makeweight.paths import MARKER, locked
from makeweight.recipe import Recipe
from tests.runs import files, same_bits

TENSORS: dict[str, Tensor] = {
    "b.weight": torch.arange(12.0).view(3, 4).bfloat16(),
    "a.turned": torch.arange(12.0).view(3, 4).T,
    "c.packed": torch.tensor([[-(2**31), 2**31 - 1]], dtype=torch.int32),
    "c.shape": torch.tensor([3, 4]),
    "d.nothing": torch.zeros(0, 4),
}
REPORT: dict[str, Any] = {"error_after": 0.1 + 0.2, "digest": {"a": "00ff"}, "bits": {"a": [3.25, 12]}}


def claimant(identity: str = "mine", **changes: str) -> Claimant:
    values = {"identity": identity, "device": "cpu", "dtype": "float32", **changes}
    return Claimant(recipe=Recipe(model="m", out="o"), **values)


def claim(path: Path | str, identity: str = "mine", shards: int = 2) -> Folder:
    return Folder.claim(path, claimant(identity), shards=shards)


def refused(path: Path, identity: str = "mine") -> str:
    before = files(path.parent)
    with pytest.raises(UserError) as caught:
        claim(path, identity)
    assert files(path.parent) == before
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_new_folder_is_claimed_and_goes_on(tmp_path: Path) -> None:
    folder = claim(tmp_path / "deep" / "down" / "out")
    assert folder.path.is_dir() and not folder.done
    assert folder.report(0) is None and folder.report(1) is None
    before = files(folder.path)
    again = claim(folder.path)
    assert not again.done and files(folder.path) == before
    (tmp_path / "empty").mkdir()
    assert not claim(tmp_path / "empty").done


def test_the_home_folder_has_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert claim("~/out").path == tmp_path / "out"
    assert not (tmp_path / "~").exists()


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    claim(tmp_path / "out", "theirs")
    assert "belongs to a run with another model, text or version" in refused(tmp_path / "out")


@pytest.mark.parametrize("read", [open_checkpoint, manifest.check, Solved])
def test_a_folder_that_is_not_finished_says_how_it_goes_on(read: Callable[[Path], object], tmp_path: Path) -> None:
    out = claim(tmp_path / "an out").path
    again = rf"{out} is not finished: .* `makeweight quantize --recipe '{out}/recipe\.json' --out '{out}'`\.$"
    with pytest.raises(UserError, match=again):
        read(out)
    (out / "recipe.json").unlink()
    with pytest.raises(UserError, match=r"run the same `makeweight quantize` again\.$"):
        read(out)
    claim(out)
    assert Recipe.load(out / "recipe.json") == claimant().recipe, "a run that goes on leaves it again"
    marker = json.loads((out / MARKER).read_text())
    (out / MARKER).write_text(json.dumps({**marker, "done": True}))
    with pytest.raises(UserError, match=r"has no|holds no"):  # it lost files after it was finished
        read(out)


def test_a_run_goes_on_in_the_dtype_it_was_begun_in(tmp_path: Path) -> None:
    out = claim(tmp_path / "out").path
    with pytest.raises(UserError, match="was begun in float32, and this machine works in bfloat16: finish it on one"):
        Folder.claim(out, claimant(dtype="bfloat16"), shards=2)
    marker = json.loads((out / MARKER).read_text())
    (out / MARKER).write_text(json.dumps({**marker, "done": True}))
    Folder.claim(out, claimant(dtype="bfloat16"), shards=2)


def test_what_differs_is_all_that_decides(tmp_path: Path) -> None:
    ours, folder = Recipe(model="m", out="o"), tmp_path

    def said(theirs: Recipe) -> str:
        (folder / "recipe.json").write_text(theirs.to_json())
        return another(folder, ours)

    same = "model, text or version of makeweight"
    assert said(replace(ours, model="n", out="p", formats=("dense",), calib=replace(ours.calib, dataset="x"))) == same
    assert said(replace(ours, options={"e2e": {"recompute": True}})) == same
    assert said(replace(ours, tune=replace(ours.tune, dtype="bfloat16"))) == same
    both = replace(ours, seed=1, tune=replace(ours.tune, rates={"lwc": 0.1}))
    assert said(both) == "recipe (seed is 1 there and 0 here, tune.rates.lwc is 0.1 there and not given here)"
    (folder / "recipe.json").write_text("{")
    assert another(folder, ours) == f"recipe, {same}"


@pytest.mark.parametrize("name", ["config.json", ".hidden", "model-00001-of-00002.safetensors"])
def test_a_folder_of_something_else(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    assert "already holds something else" in refused(out)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    assert "already holds something else" in refused(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"identity": 3}', "\x00"])
def test_a_marker_that_is_not_ours(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_text(text)
    refused(out)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, second = claim(tmp_path / "out"), claim(tmp_path / "out")
    with first.alone():
        with pytest.raises(UserError, match=rf"{tmp_path}/out is being written by another run: wait"), second.alone():
            pass
        with claim(tmp_path / "other").alone():
            pass
    with second.alone():
        pass


def test_a_folder_that_another_run_takes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen an empty folder; the slower one finds a marker once nobody holds the folder any more."""
    pytest.importorskip("fcntl")
    out, seen = tmp_path / "out", folder_module.check
    out.mkdir()
    with locked(out, wait=False):
        assert "is being written by another run" in refused(out)

    def slow(path: Path, run: Claimant) -> None:
        seen(path, run)
        if run.identity == "mine":
            claim(path, "theirs")

    monkeypatch.setattr(folder_module, "check", slow)
    with pytest.raises(UserError, match="belongs to a run with another model"):
        claim(out)
    assert json.loads((out / MARKER).read_text())["identity"] == "theirs"


def test_a_run_that_fails_lets_others_in(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), folder.alone():
        raise ZeroDivisionError
    with folder.alone():
        pass


def test_a_shard_comes_back(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out")
    folder.write(1, TENSORS, REPORT)
    assert folder.report(0) is None
    assert folder.report(1) == REPORT
    found = folder.read(1)
    assert found.keys() == TENSORS.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in TENSORS.items())
    assert folder.shard(1).name == "model-00002-of-00002.safetensors"
    assert claim(tmp_path / "out").report(1) == REPORT


def test_the_same_shard_has_the_same_bytes(tmp_path: Path) -> None:
    """Whatever order tensors come in, and however often it is written."""
    folder = claim(tmp_path / "out", shards=40)
    for index in range(0, 40, 2):
        folder.write(index, TENSORS, REPORT)
        folder.write(index + 1, dict(reversed(TENSORS.items())), dict(reversed(REPORT.items())))
    assert len({folder.shard(index).read_bytes() for index in range(40)}) == 1


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out")
    old = os.umask(0o027)
    try:
        folder.write(0, TENSORS, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.shard(0).stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_shard_is_whole_or_absent(step: str, tmp_path: Path) -> None:
    folder = claim(tmp_path / "out")
    folder.write(0, TENSORS, REPORT)
    before = folder.shard(0).read_bytes()

    def fail(*args: object) -> None:
        raise OSError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
        for index in (0, 1):
            with pytest.raises(OSError, match="no space left"):
                folder.write(index, {"other": torch.zeros(2)}, {"other": 1})
        with pytest.raises(OSError, match="no space left"):
            folder.write_text("words.txt", "some")
    assert folder.shard(0).read_bytes() == before and folder.report(0) == REPORT
    assert folder.report(1) is None and not (folder.path / "words.txt").exists()
    folder.write(1, TENSORS, REPORT)
    folder.write_text("words.txt", "some")
    assert folder.read(1).keys() == TENSORS.keys() and (folder.path / "words.txt").read_text() == "some"


def test_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(b'{"crlf": true}\r\n\xff')
    folder = claim(tmp_path / "out")
    folder.write(0, {"embed": torch.ones(2, 2)}, {})
    folder.write(1, {"up.weight": torch.ones(3), "down.weight": torch.zeros(3)}, REPORT)
    order: list[str] = []
    write_text = Folder.write_text

    def spy(self: Folder, name: str, text: str) -> None:
        order.append(name)
        assert not self.done and (name == MARKER or not (self.path / "config.json").exists())
        write_text(self, name, text)

    monkeypatch.setattr(Folder, "write_text", spy)
    folder.finish({"model_type": "none", "a": "é"}, [source], source.parent, {"recipe.json": "the recipe\n"})
    assert order[-2:] == ["config.json", MARKER], "config.json, without which nothing loads the folder, comes last"
    assert folder.done and claim(folder.path).done
    with pytest.raises(UserError):
        claim(folder.path, "theirs")
    assert (folder.path / "tokenizer.json").read_bytes() == source.read_bytes()
    assert (folder.path / "recipe.json").read_text() == "the recipe\n"
    assert json.loads((folder.path / "config.json").read_text()) == {"model_type": "none", "a": "é"}
    index = json.loads((folder.path / INDEX).read_text())
    first, second = folder.shard(0).name, folder.shard(1).name
    assert index["weight_map"] == {"embed": first, "up.weight": second, "down.weight": second}
    assert folder.size() == sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    assert not list(folder.path.glob("*.part"))


def test_a_manifest_that_could_not_be_written_names_only_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = claim(tmp_path / "out", shards=1)
    folder.write(0, TENSORS, {})
    folder.finish({}, [], tmp_path, {})

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, "fsync", full)
        folder.seal()
    folder.seal()
    assert manifest.check(folder.path) == []


def test_finishing_without_a_shard_fails(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out")
    folder.write(0, TENSORS, {})
    with pytest.raises(FileNotFoundError):
        folder.finish({}, [], tmp_path, {})
    assert not folder.done and not (folder.path / "config.json").exists()
