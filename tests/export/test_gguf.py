"""Models of every family come back whole from a GGUF file, with their metadata and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from makeweight.errors import UserError
from makeweight.export import manifest
from makeweight.export.base import deviation
from makeweight.export.folder import Folder
from makeweight.export.gguf import Gguf
from makeweight.export.gguf_blocks import BLOCKS
from makeweight.export.gguf_file import decode, stored_tensors
from makeweight.export.run import _compare, export_model
from makeweight.export.solved import Solved
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from tests.runs import a_text, small, weights_of
from tests.tiny import tiny_folder


def solved_model(family: str, scheme: str, folder: Path, **changes: Any) -> Path:
    text = a_text(folder / "words.txt")
    source = tiny_folder(family, folder / "source")
    quantize(small(source, folder / "solved", text, method="rtn", scheme=Scheme.parse(scheme), **changes))
    return folder / "solved"


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("family", "scheme", "block"),
    [
        ("llama", "W4A16g32_sym", "Q4_0"),
        ("llama-tied", "W4A16g64", "Q4_1"),
        ("mistral", "W2A16g64_sym", "Q2_0"),
        ("qwen2", "W8A16_sym", "Q8_0"),
        ("qwen3", "W5A16g32_sym", "Q5_0"),
    ],
)
def test_whole_models(family: str, scheme: str, block: str, tmp_path: Path) -> None:
    solved = solved_model(family, scheme, tmp_path)
    (item,) = export_model(solved, ["gguf"], out=tmp_path)
    assert item.linears == 21 and (item.deviation == 0) == (block != "Q4_1")
    (file,) = item.path.glob("*.gguf")
    assert file.name == f"solved-{block}.gguf"
    assert not list(item.path.glob("*.safetensors")) and not (item.path / "config.json").exists()
    assert manifest.check(item.path) == []

    stored = stored_tensors(file)
    kinds = {b.name: b.kind for b in BLOCKS}
    assert sum(tensor.kind == kinds[block] for tensor in stored.values()) == 21
    assert all(tensor.kind == 0 for tensor in stored.values() if len(tensor.shape) == 1)
    assert ("output.weight" in stored) == (family not in ("llama-tied", "qwen2"))
    assert stored["token_embd.weight"].kind == 30 and stored["token_embd.weight"].shape == (320, 64)
    name = {"llama-tied": "llama", "mistral": "llama"}.get(family, family)
    assert ("blk.0.attn_k_norm.weight" in stored) == (name == "qwen3")
    ours = weights_of(solved)["model.layers.1.mlp.down_proj.weight"].float()
    scale = next(dict(part.quantized)["model.layers.1.mlp.down_proj"] for part in list(Solved(solved).parts())[2:])
    assert deviation(decode(stored["blk.1.ffn_down.weight"]), scale) <= 15 / 2048
    assert torch.allclose(decode(stored["blk.1.ffn_down.weight"]), ours, atol=1e-2)
    if block != "Q2_0":
        check_fields(fields(file), name, family)


def check_fields(found: dict[str, Any], arch: str, family: str) -> None:
    size = 32 if arch == "qwen3" else 16
    expected = {
        "general.architecture": arch,
        "general.quantization_version": 2,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": 64,
        f"{arch}.block_count": 3,
        f"{arch}.feed_forward_length": 128,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": size,
        f"{arch}.rope.dimension_count": size,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6, rel=1e-6)
    assert "add_generation_prompt" in found["tokenizer.chat_template"]
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[256:260] == ["<s>", "</s>", "<pad>", "[PAD259]"] and len(set(tokens)) == 320
    assert kinds == [1] * 256 + [3] * 3 + [5] * 61


def test_blocks_that_were_left_alone_keep_their_values(tmp_path: Path) -> None:
    """Their query and key rows change places as well."""
    solved = solved_model("llama-tied", "W3A16g64", tmp_path, blocks=(0, 2))
    (item,) = export_model(solved, ["gguf"], out=tmp_path)
    assert item.deviation == 0 and item.linears == 14
    (file,) = item.path.glob("*-Q4_0.gguf")
    stored, source = stored_tensors(file), {name: t for part in Solved(solved).parts() for name, t in part.kept.items()}
    (loose,) = {
        int(name.split(".")[1]) for name, t in stored.items() if name.endswith("ffn_up.weight") and t.kind == 30
    }
    for module in ("q", "k"):
        ours = source[f"model.layers.{loose}.self_attn.{module}_proj.bias"].float()
        theirs = decode(stored[f"blk.{loose}.attn_{module}.bias"])
        assert not torch.equal(ours, theirs) and torch.equal(ours[:16].view(2, 8).T.flatten(), theirs[:16])


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    solved = solved_model("qwen2", "W2A16g64_sym", tmp_path)
    (item,) = export_model(solved, ["gguf"], out=tmp_path)
    (file,) = item.path.glob("*.gguf")
    place = stored_tensors(file)["blk.2.ffn_up.weight"].data
    raw = bytearray(file.read_bytes())
    at = raw.index(place.tobytes())
    del place
    raw[at] ^= 1
    file.write_bytes(raw)
    assert manifest.check(item.path) == [f"{file.name} is damaged in blk.2.ffn_up.weight."]
    with pytest.raises(RuntimeError, match="reads back differently"):
        _compare(Gguf(), Solved(solved), item.path)


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    solved = solved_model("llama", "W4A16g32_sym", tmp_path)
    (solved / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        export_model(solved, ["gguf"], out=tmp_path / "out")
    Folder(solved, 0).seal()  # as where the original has none
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        export_model(solved, ["gguf"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_beginning_that_the_tokenizer_adds(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    solved = solved_model("llama", "W4A16g32_sym", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(solved)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 256)])
    # As training with a fixed length leaves it; nobody means that prompts end so.
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=257, pad_token="</s>")
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.save(str(solved / "tokenizer.json"))
    (item,) = export_model(solved, ["gguf"], out=tmp_path)
    found = fields(next(item.path.glob("*.gguf")))
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
