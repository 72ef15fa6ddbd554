"""One solve, every format: what is written reads back as what was solved, and is not written twice."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from makeweight.errors import UserError
from makeweight.export import manifest, run
from makeweight.export.base import Format
from makeweight.export.dense import Dense
from makeweight.export.formats import FORMATS
from makeweight.export.hf import ShardWriter
from makeweight.export.run import can_export, export_model
from makeweight.export.solved import Solved
from makeweight.models.shards import Shards
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.report.record import Record
from tests.runs import files, our_logits, same_bits, small, tensors, weights_of
from tests.tiny import tiny_folder

SCHEMES = ("W2A16g32", "W3A16", "W4A16g32", "W4A16g32_sym", "W8A16_sym", "W8A8")


@pytest.fixture(scope="module", params=SCHEMES)
def solved(request: pytest.FixtureRequest, root: Path) -> Path:
    out = root / request.param
    quantize(
        small(root / "source", out, root / "words.txt", method="rtn", scheme=Scheme.parse(request.param), blocks=(0, 2))
    )
    return out


def test_every_format_that_fits_reads_back(solved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: set[int] = set()
    monkeypatch.setattr(run, "to_disk", lambda file: settled.add(file.stat().st_ino))
    answers = can_export(Solved(solved))
    assert [answer.format for answer in answers] == list(FORMATS)
    yes = [answer.format for answer in answers if not answer.refusal]
    assert {"dense", "compressed-tensors"} <= set(yes)
    for item in export_model(solved, yes, out=tmp_path):
        assert item.path == tmp_path / item.format and item.linears == 14
        assert item.deviation == 0 or not next(a for a in answers if a.format == item.format).exact
        assert manifest.check(item.path) == []
        written = [file.stat() for file in item.path.rglob("*") if file.is_file()]
        assert {file.st_ino for file in written} <= settled and len({file.st_mode for file in written}) == 1
        assert not list(tmp_path.glob("*.part"))
    for answer in answers:
        if answer.refusal:
            with pytest.raises(UserError, match="cannot hold"):
                export_model(solved, [answer.format], out=tmp_path)
            assert not (tmp_path / answer.format).exists()


def test_what_holds_weights_alone_is_named_as_it_is_written(
    solved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(solved, ["dense", "compressed-tensors"], out=tmp_path)
    said = "Only weights are held by dense: activations, which W8A8 has rounded to 8 bits, stay as they are there.\n"
    assert capsys.readouterr().err == (said if solved.name == "W8A8" else "")


def test_a_full_disk_is_named_by_the_folder_and_leaves_nothing(
    solved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # of a write, which knows no name

    monkeypatch.setattr(Dense, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export_model(solved, ["dense"], out=tmp_path)
    assert caught.value.filename == str(tmp_path / "dense") and not list(tmp_path.iterdir())


def test_nothing_is_lost(solved: Path, tmp_path: Path) -> None:
    dense, packed = (item.path for item in export_model(solved, ["dense", "compressed-tensors"], out=tmp_path))
    ours = tensors(solved)
    assert all(same_bits(tensor, ours[name]) for name, tensor in tensors(packed).items())
    assert tensors(packed).keys() == ours.keys()
    names = set(Solved(solved).names)
    source = tensors(solved.parent / "source")
    assert tensors(dense).keys() == source.keys()
    for name, tensor in tensors(dense).items():
        if name.removesuffix(".weight") not in names:
            assert same_bits(tensor, source[name])
    for folder in (dense, packed):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (solved.parent / "source" / name).read_bytes()
    assert json.loads((dense / "config.json").read_text()) == json.loads(
        (solved.parent / "source" / "config.json").read_text()
    )
    tokens_NT = torch.arange(24).reshape(2, 12) * 7 % 256
    assert torch.equal(our_logits(dense, tokens_NT), our_logits(solved, tokens_NT))
    weights = weights_of(solved)
    assert all(same_bits(weight, weights[name]) for name, weight in weights_of(packed).items())


def test_written_once(root: Path, tmp_path: Path) -> None:
    out = root / "once"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    (first,) = export_model(out, ["dense"], out=tmp_path)
    before = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert export_model(out, ["dense"], out=tmp_path) == [first]
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == before
    assert run.target_of(out, "dense", None) == root / "once-dense"


def test_a_damaged_export_is_written_again(root: Path, tmp_path: Path) -> None:
    out = root / "damaged"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    (first,) = export_model(out, ["dense"], out=tmp_path)
    sound = files(first.path)
    (first.path / "config.json").write_text("{}")
    assert export_model(out, ["dense"], out=tmp_path) == [first]
    assert files(first.path) == sound


def test_an_export_that_was_deleted_is_written_again(root: Path, tmp_path: Path) -> None:
    recipe = small(root / "source", tmp_path / "out", root / "words.txt", method="rtn", formats=("dense",))
    record = quantize(recipe)
    shutil.rmtree(tmp_path / "out-dense")
    assert quantize(recipe) == record
    assert manifest.check(tmp_path / "out") == manifest.check(tmp_path / "out-dense") == []


def test_a_format_that_is_refused_late_does_not_take_the_record_with_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(root / "source", tmp_path / "out", root / "words.txt", method="rtn", formats=("dense",))
    monkeypatch.setattr(Dense, "refusal", lambda _, facts: "no" if facts.zeros is not None else None)
    with pytest.raises(UserError, match="dense cannot hold"):
        quantize(recipe)
    assert Record.load(tmp_path / "out").perplexities and manifest.check(tmp_path / "out") == []
    monkeypatch.undo()
    assert [item["format"] for item in quantize(recipe).exports] == ["dense"]


def test_scales_that_are_no_half_floats_are_refused_before_solving(root: Path, tmp_path: Path) -> None:
    scheme = replace(Scheme.parse("W4A16g32"), scale_dtype="float32")
    recipe = small(root / "source", tmp_path / "out", root / "words.txt", scheme=scheme, formats=("gptq",))
    with pytest.raises(UserError, match="gptq cannot hold"):
        quantize(recipe)
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_model_knows(root: Path, tmp_path: Path) -> None:
    """GGUF has no names for them, which is said before solving; ONNX holds any dtype."""
    source = tiny_folder("llama", tmp_path / "source")
    extra = {"score.weight": torch.ones(2, 64), "ids": torch.arange(4, dtype=torch.int32), "on": torch.ones(3) > 0}
    save_file({**load_file(source / "model.safetensors"), **extra}, source / "model.safetensors", {"format": "pt"})
    scheme = Scheme.parse("W4A16g32_sym")
    recipe = small(source, tmp_path / "out", root / "words.txt", method="rtn", scheme=scheme)
    with pytest.raises(UserError, match=r"gguf cannot hold .* it holds (score\.weight|ids|on), which has no name"):
        quantize(replace(recipe, formats=("gguf",)))
    assert not (tmp_path / "out").exists()
    (found,) = quantize(replace(recipe, formats=("onnx",))).exports
    assert found["format"] == "onnx"


def test_chat_templates_beside_the_default_are_passed_on(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "model")
    template = tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ tools }}")
    quantize(small(tmp_path / "model", tmp_path / "out", root / "words.txt", method="rtn", formats=("dense",)))
    for name in ("out", "out-dense"):
        copy = tmp_path / name / "additional_chat_templates" / "tool_use.jinja"
        assert copy.read_text() == template.read_text()
        assert manifest.check(tmp_path / name) == []


def test_an_interrupted_export_starts_again(root: Path, tmp_path: Path) -> None:
    out = root / "interrupted"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    (tmp_path / "dense.part").mkdir()
    (tmp_path / "dense.part" / "model.safetensors").write_bytes(b"half")
    (again,) = export_model(out, ["dense"], out=tmp_path)
    (straight,) = export_model(out, ["dense"], out=tmp_path / "other")
    assert files(again.path) == files(straight.path)


def test_formats_of_a_recipe(root: Path, tmp_path: Path) -> None:
    recipe = small(root / "source", tmp_path / "out", root / "words.txt", method="rtn", formats=("dense",))
    record = quantize(recipe)
    assert [item["format"] for item in record.exports] == ["dense"]
    assert manifest.check(tmp_path / "out") == manifest.check(tmp_path / "out-dense") == []
    assert quantize(recipe) == record


def test_refusals(root: Path, tmp_path: Path) -> None:
    out = root / "refusals"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    with pytest.raises(UserError, match=r"format 'dens' is unknown \(did you mean 'dense'\?\)|did you mean"):
        export_model(out, ["dens"])
    (tmp_path / "dense").mkdir()
    with pytest.raises(UserError, match="already holds something else"):
        export_model(out, ["compressed-tensors", "dense"], out=tmp_path)
    assert not (tmp_path / "compressed-tensors").exists()
    with pytest.raises(UserError, match="is not a folder that `makeweight quantize` wrote"):
        export_model(root / "source", ["dense"])
    with pytest.raises(UserError, match="format 'gguff' is unknown"):
        quantize(small(root / "source", tmp_path / "new", root / "words.txt", formats=("gguff",)))
    assert not (tmp_path / "new").exists()


class Wrong(Dense):
    """Reads one weight back with one bit off."""

    def read(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:
        for index, (name, weight_OI) in enumerate(super().read(solved, folder)):
            if index == 3:
                weight_OI = weight_OI.clone()
                weight_OI[1, 1] *= 1 + 2**-7
            yield name, weight_OI


class Forgetful(Dense):
    """Forgets the final norm."""

    def write(self, solved: Solved, folder: Path) -> None:
        super().write(solved, folder)
        held = load_file(folder / "model.safetensors")
        del held["model.norm.weight"]
        save_file(held, folder / "model.safetensors")


@pytest.mark.parametrize("form", [Wrong(), Forgetful()], ids=lambda form: type(form).__name__)
def test_a_wrong_file_never_gets_its_name(
    form: Format, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = root / "wrong"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    monkeypatch.setitem(FORMATS, "dense", form)
    with pytest.raises(RuntimeError, match=r"reads back differently|is missing"):
        export_model(out, ["dense"], out=tmp_path)
    assert not (tmp_path / "dense").exists()


def test_shards_fill_up_block_by_block(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, limit=4000)
    blocks = [{f"{i}.{k}": torch.full((100,), float(10 * i + k)) for k in range(3)} for i in range(7)]
    for block in blocks:
        writer.add(block)
    writer.close()
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [
        f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)
    ] and not list(tmp_path.glob("*.part"))
    shards = Shards(tmp_path)
    for name, tensor in (pair for block in blocks for pair in block.items()):
        assert torch.equal(shards.read(name), tensor)


def test_a_damaged_master_is_not_passed_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    shard = out / "model-00002-of-00004.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(
        UserError, match=r"is not what was solved: model-00002-of-00004\.safetensors is damaged in model"
    ):
        export_model(out, ["dense"])
    assert not (tmp_path / "out-dense").exists()


def test_a_folder_in_the_way_is_refused_before_solving(root: Path, tmp_path: Path) -> None:
    recipe = small(root / "source", tmp_path / "out", root / "words.txt", method="rtn", formats=("dense",))
    (tmp_path / "out-dense").mkdir()
    with pytest.raises(UserError, match="out-dense already holds something else"):
        quantize(recipe)
    assert not (tmp_path / "out").exists()


def test_a_run_that_dies_while_measuring_again_is_sealed_by_the_next(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(root / "source", tmp_path / "out", root / "words.txt", method="rtn")
    quantize(recipe)
    again = replace(recipe, eval=replace(recipe.eval, windows=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("makeweight.export.folder.Folder.seal", interrupt)
        quantize(again)
    quantize(again)
    assert manifest.check(tmp_path / "out") == []


def interrupt(_: object) -> None:
    raise KeyboardInterrupt
