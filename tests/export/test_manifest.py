"""Whatever changes in a written folder is found, and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from makeweight.errors import UserError
from makeweight.export import manifest


def a_folder(path: Path) -> Path:
    path.mkdir()
    save_file({"a.weight": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "none"}\n')
    (path / "onnx").mkdir()
    (path / "onnx" / "notes.txt").write_text("deep")
    (path / manifest.NAME).write_text(manifest.build(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_folder(tmp_path_factory.mktemp("manifest") / "folder")


def test_untouched(folder: Path) -> None:
    assert manifest.check(folder) == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_found(folder: Path, data: st.DataObject) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    sound = file.read_bytes()
    place, bit = data.draw(st.integers(0, len(sound) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(sound)
    damaged[place] ^= 1 << bit
    try:
        file.write_bytes(damaged)
        problems = manifest.check(folder)
    finally:
        file.write_bytes(sound)
    assert problems and file.name in problems[0]


def test_what_hubs_add_does_not_count(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "folder")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "model.safetensors.metadata").write_text("an etag\n")
    assert manifest.check(folder) == []
    (folder / "model-2.safetensors").write_bytes(b"")
    assert manifest.check(folder) == ["model-2.safetensors is not part of what was written."]


def test_the_tensor_is_named(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "folder")
    file = folder / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1  # the last byte of b
    file.write_bytes(damaged)
    assert manifest.check(folder) == ["model.safetensors is damaged in b."]


def test_missing_cut_short_and_strange_files(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "folder")
    (folder / "config.json").unlink()
    (folder / "extra.bin").write_bytes(b"x")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-2])
    assert manifest.check(folder) == [
        "config.json is missing.",
        f"model.safetensors has {size - 2} bytes instead of {size}.",
        "extra.bin is not part of what was written.",
    ]


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        manifest.check(tmp_path)


def test_what_others_added_is_told_apart_where_the_manifest_can_tell(tmp_path: Path) -> None:
    assert manifest.strangers(tmp_path / "folder") == []
    folder = a_folder(tmp_path / "folder")
    assert manifest.strangers(folder) == []
    (folder / ".git").mkdir()
    for name in ("README.md", ".git/HEAD"):
        (folder / name).write_text("mine")
    assert manifest.strangers(folder) == [".git/HEAD", "README.md"]
    (folder / manifest.NAME).write_text("{")
    with pytest.raises(UserError, match=r"is damaged, its manifest\.json as well: delete it"):
        manifest.strangers(folder)
