"""What the same folder is asked again: room on the disk, another device, and the recipe that it saves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from makeweight import pipeline
from makeweight.errors import UserError
from makeweight.export import manifest
from makeweight.export.claim import Claimant, check
from makeweight.export.folder import Folder
from makeweight.export.solved import Solved
from makeweight.job import Job
from makeweight.models.checkpoint import Checkpoint
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import ScaleDtype, Scheme
from makeweight.pipeline import preflight, quantize
from makeweight.recipe import Calib, Eval, Recipe, Tune
from makeweight.report.record import Record
from tests.runs import small
from tests.tiny import tiny_folder

NOT_MEASURED = Eval(datasets=(), seqlen=64)
pytestmark = pytest.mark.usefixtures("known_rate")


def test_a_finished_run_needs_no_room(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="mse+e2e", formats=("gptq",))
    done, before = quantize(recipe), stamps(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert quantize(recipe) == done
    assert preflight(recipe) == f"{tmp_path / 'out'} has all that was asked for: nothing is left to do."
    assert stamps(tmp_path) == before, "nothing is written again, formats and manifests no more than weights"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    measured = replace(recipe, eval=replace(NOT_MEASURED, datasets=(str(text),)))
    for more in (replace(recipe, formats=("gptq", "dense")), measured):
        assert "All blocks are solved: what is left will take" in preflight(more)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="free some space"):
        quantize(replace(recipe, formats=("gptq", "dense")))
    with pytest.raises(UserError, match="free some space"):
        quantize(replace(recipe, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists(), "what cannot end is refused before anything is written"


def stamps(folder: Path) -> dict[Path, int]:
    """Return when every file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_what_was_damaged_stays_so_in_a_record_written_again(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="rtn")
    quantize(recipe)
    damaged = tmp_path / "out" / "tokenizer_config.json"
    damaged.write_text(damaged.read_text() + " ")
    for changes in ({"formats": ("dense",)}, {"eval": Eval(datasets=(str(text),), seqlen=64, windows=2)}):
        quantize(replace(recipe, **changes))
        (problem,) = manifest.check(tmp_path / "out")
        assert "tokenizer_config.json has" in problem


def test_what_is_not_asked_for_again_stays_in_the_record(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, method="rtn", formats=("dense",))
    first = quantize(recipe)
    assert quantize(replace(recipe, formats=())) == first
    assert quantize(replace(recipe, eval=NOT_MEASURED)) == first
    both = quantize(replace(recipe, eval=NOT_MEASURED, formats=("gptq",)))
    assert both.perplexities == first.perplexities and both.recipe["eval"] == first.recipe["eval"]
    assert [item["format"] for item in both.exports] == ["dense", "gptq"]
    assert Recipe.load(tmp_path / "out" / "recipe.json").eval == recipe.eval
    other = quantize(replace(recipe, eval=replace(recipe.eval, windows=1), formats=()))
    assert other.perplexities != first.perplexities and other.exports == both.exports


def test_code_that_is_not_copied_is_not_named(text: Path, tmp_path: Path) -> None:
    source = tiny_folder("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "mine.MyConfig"}}))
    (source / "mine.py").write_text("")
    quantize(small(source, tmp_path / "out", text, method="rtn", eval=NOT_MEASURED))
    assert not (tmp_path / "out" / "mine.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_same_text_by_another_name_is_the_same_run(llama: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy.txt"
    other.write_bytes(text.read_bytes())
    recipe, copied = (small(llama, tmp_path / "out", path, eval=NOT_MEASURED) for path in (text, other))
    other.with_name("less.txt").write_bytes(text.read_bytes()[:-1500])
    less = small(llama, tmp_path / "out", other.with_name("less.txt"), eval=NOT_MEASURED)
    assert Job.prepare(recipe).identity() == Job.prepare(copied).identity() != Job.prepare(less).identity()


def test_the_most_memory_of_all_that_solved_is_kept(tmp_path: Path) -> None:
    recipe = Recipe(model="m", out="o")
    run = Claimant(identity="one", recipe=recipe, device="cpu", dtype="float32")
    folder = Folder.claim(tmp_path / "out", run, shards=1)
    for peaks in ([300, 0], [200, 7]):
        folder.note_solver({"machine": {}, "peaks": peaks})
    assert folder.solved_by["peaks"] == [300, 7]


def test_a_run_is_finished_where_it_was_begun(llama: Path, text: Path, tmp_path: Path) -> None:
    """Devices differ in the last bits; what is solved can be asked for anything on any device."""
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, tune=Tune(steps=4, device="auto"))
    job = Job.prepare(recipe)
    named = replace(recipe, tune=replace(recipe.tune, device=job.device.type))
    on_gpu = replace(job.claimant(), device="gpu")
    Folder.claim(recipe.out, on_gpu, shards=4)
    with pytest.raises(UserError, match=f"out was begun on gpu, not on {job.device.type}: finish it there, or delete"):
        quantize(recipe)
    shutil.rmtree(recipe.out)
    record = quantize(recipe)
    assert quantize(named).digest == record.digest, "auto is the device that was found"
    check(recipe.out, on_gpu)


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


def test_evaluating_again_leaves_what_solving_took(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="rtn")
    monkeypatch.setattr(pipeline, "peak_memory", lambda: 5_000_000_000)
    monkeypatch.setattr(pipeline, "machine", lambda *_: {"device": "where it was solved"})
    first = quantize(recipe)
    monkeypatch.setattr(pipeline, "peak_memory", lambda: 1_000_000_000)
    monkeypatch.setattr(pipeline, "machine", lambda *_: {"device": "another"})
    again = quantize(replace(recipe, eval=Eval(datasets=(str(text),), seqlen=64, windows=2)))
    assert again.perplexities and again.machine == first.machine == {"device": "where it was solved"}
    assert again.cost.peak_memory_bytes == first.cost.peak_memory_bytes == 5_000_000_000


def test_samples_begin_with_the_token_that_the_model_needs(text: Path, tmp_path: Path) -> None:
    gemma = tiny_folder("gemma2", tmp_path / "gemma")
    recipe = small(
        gemma, tmp_path / "out", text, method="lwc", calib=Calib(dataset=str(text), nsamples=2, seqlen=64, piece=16)
    )
    tokens_NT = Job.prepare(recipe).tokens_NT
    assert tokens_NT is not None and tokens_NT.shape == (8, 16) and tokens_NT[:, 0].tolist() == [256] * 8


def test_a_file_that_is_lost_is_named_and_a_record_is_made_again(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe, out = small(llama, tmp_path / "out", text, method="rtn"), tmp_path / "out"
    done = quantize(recipe)
    saved = (out / "recipe.json").read_text()
    for lost in ("{}", "[]", "{", None):
        (out / "record.json").unlink()
        if lost is not None:
            (out / "record.json").write_text(lost)
        assert quantize(recipe).perplexities[0].perplexity == done.perplexities[0].perplexity
        assert Record.load(out).digest == done.digest
    (out / "recipe.json").unlink()
    quantize(recipe)
    assert (out / "recipe.json").read_text() == saved
    (out / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"out is not what was solved: tokenizer.json is missing\."):
        quantize(recipe)


def test_a_damaged_export_is_written_again(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="rtn", formats=("dense",))
    done, file = quantize(recipe), tmp_path / "out-dense" / "model.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert quantize(recipe) == done
    assert file.read_bytes() == sound


def test_a_run_goes_on_with_the_threads_that_it_began_with(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, mine = small(llama, tmp_path / "out", text, eval=NOT_MEASURED), torch.get_num_threads()
    job = Job.prepare(recipe)
    Folder.claim(recipe.out, job.claimant(), shards=4).threads(mine + 1)
    seen: list[int] = []
    solve = pipeline.Run.solve
    monkeypatch.setattr(pipeline.Run, "solve", lambda run: (seen.append(torch.get_num_threads()), solve(run)))
    quantize(recipe)
    assert seen == [mine + 1] and torch.get_num_threads() == mine
    assert f"out was begun with {mine + 1} threads: going on with as many." in capsys.readouterr().err


def test_an_occupied_folder_is_refused_before_weights_are_read(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    monkeypatch.setattr(Checkpoint, "check_sound", lambda _: pytest.fail("it takes minutes to read a large model"))
    with pytest.raises(UserError, match="already holds something else"):
        quantize(small(llama, tmp_path, text, eval=NOT_MEASURED))


def test_a_run_that_died_of_memory_goes_on_with_less_of_it(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, eval=NOT_MEASURED, method="mse+e2e")
    kept = replace(recipe, options={"e2e": {"recompute": False}})
    other = replace(recipe, options={"e2e": {"norms": False}})
    assert Job.prepare(kept).identity() == Job.prepare(recipe).identity() != Job.prepare(other).identity()


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [
        (torch.float32, "auto"),
        (torch.float16, "bfloat16"),
        (torch.bfloat16, "float16"),
        (torch.bfloat16, "auto"),
        (torch.float16, "float32"),
    ],
)
def test_transformers_decodes_what_was_solved(
    text: Path, tmp_path: Path, dtype: torch.dtype, scale_dtype: ScaleDtype
) -> None:
    """It multiplies in the dtype of the scales: one that is narrower than the weights would round them once more."""
    source = tiny_folder("llama", tmp_path / "source", dtype=dtype)
    for scheme in (Scheme(bits=4, group_size=16), Scheme(bits=8, group_size=16)):
        scheme = replace(scheme, scale_dtype=scale_dtype)
        changes = {"method": "rtn", "scheme": scheme, "eval": NOT_MEASURED}
        record = quantize(small(source, tmp_path / f"out-{scheme.bits}", text, **changes))
        theirs = AutoModelForCausalLM.from_pretrained(record.path, dtype="auto").state_dict()
        ours = open_checkpoint(record.path)
        for name, tensor in ours.block_state(0).items():
            assert torch.equal(tensor, theirs[f"model.layers.0.{name}"]), name
        assert ours.dtype == dtype


def test_an_embedding_that_is_wider_does_not_change_the_dtype(text: Path, tmp_path: Path) -> None:
    source = tiny_folder("llama", tmp_path / "source", dtype=torch.bfloat16)
    stored = load_file(source / "model.safetensors")
    outside = {name: tensor.float() if "layers" not in name else tensor for name, tensor in stored.items()}
    save_file(outside, source / "model.safetensors", {"format": "pt"})
    record = quantize(small(source, tmp_path / "out", text, method="rtn", eval=NOT_MEASURED))
    assert open_checkpoint(source).dtype == open_checkpoint(record.path).dtype == torch.bfloat16
    assert Solved(record.path).dtype == torch.bfloat16


def test_a_folder_that_was_moved(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = small(llama, tmp_path / "out", text, method="rtn", eval=NOT_MEASURED)
    done = quantize(recipe)
    (tmp_path / "out").rename(tmp_path / "other")
    assert quantize(replace(recipe, out=str(tmp_path / "other"))).path == str(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match="has lost its quantization_config"):
        _ = Solved(tmp_path / "other").ignore
    assert done.path == str(tmp_path / "out")
