"""Exports that are written anew: what others put there stays, and dying or a full disk on the way is no obstacle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from makeweight.errors import UserError
from makeweight.export import manifest
from makeweight.export.run import can_export, export_model
from makeweight.export.solved import Solved
from makeweight.pipeline import quantize
from tests.runs import files, small, tensors


def test_what_others_put_into_an_export_is_left_alone(root: Path, tmp_path: Path) -> None:
    out = root / "visited"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    (first,) = export_model(out, ["dense"], out=tmp_path)
    (first.path / ".git").mkdir()
    for name in ("README.md", ".git/HEAD"):
        (first.path / name).write_text("mine")
    assert export_model(out, ["dense"], out=tmp_path) == [first]
    (first.path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds what makeweight did not write \(\.git/HEAD\): move that elsewhere"):
        export_model(out, ["dense"], out=tmp_path)
    assert (first.path / "README.md").read_text() == (first.path / ".git/HEAD").read_text() == "mine"


def test_an_edited_template_reaches_an_export_that_is_there(root: Path, tmp_path: Path) -> None:
    quantize(small(root / "source", tmp_path / "out", root / "words.txt", method="rtn"))
    (first,) = export_model(tmp_path / "out", ["dense"])
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ mended }}")
    (again,) = export_model(tmp_path / "out", ["dense"])
    assert again.path == first.path and (again.path / "chat_template.jinja").read_text() == "{{ mended }}"
    assert manifest.check(again.path) == []


def test_dying_while_an_export_is_replaced_is_no_obstacle(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = root / "replaced"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))
    (first,) = export_model(out, ["dense"], out=tmp_path)
    sound = files(first.path)
    (first.path / "config.json").write_text("{}")
    whole = shutil.rmtree

    def dies(folder: Path, *, ignore_errors: bool) -> None:
        if folder.exists():
            (folder / "export.json").unlink(missing_ok=True)
            raise KeyboardInterrupt
        whole(folder, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", dies)
        export_model(out, ["dense"], out=tmp_path)
    assert export_model(out, ["dense"], out=tmp_path) == [first] and files(first.path) == sound


def test_a_tied_head_alone_becomes_an_embedding_in_every_format(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    save_file(held, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for name in ("model", "whole"):
        source = tmp_path / "model" if name == "model" else root / "source"
        quantize(small(source, tmp_path / f"{name}-w", root / "words.txt", method="rtn"))
    ours, theirs = (Solved(tmp_path / f"{name}-w") for name in ("model", "whole"))
    assert tensors(ours.path).keys() == tensors(theirs.path).keys()
    yes = [answer.format for answer in can_export(ours) if not answer.refusal]
    assert {"gguf", "onnx"} & set(yes)
    assert [item.kept for item in export_model(ours.path, yes)] == [
        item.kept for item in export_model(theirs.path, yes)
    ]


def test_a_full_disk_leaves_no_half_export(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = root / "full"
    quantize(small(root / "source", out, root / "words.txt", method="rtn"))

    def full(tensors: dict[str, Tensor], file: Path, _: object) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        export_model(out, ["dense"], out=tmp_path)
    assert list(tmp_path.iterdir()) == []
