"""Attention does not notice the new order of its rows, and tokenizers are named by how they split text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from makeweight.export import gguf_vocab
from makeweight.export.gguf_model import Model
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from tests.tiny import tiny_tokenizer


def rotate(states_HTD: Tensor, neighbours: bool) -> Tensor:
    """Turn pairs of dimensions by the angle of each position, with complex numbers."""
    tokens, size = states_HTD.shape[1:]
    angle = torch.arange(tokens).double()[:, None] * 100.0 ** -(torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angle), angle)
    if neighbours:
        turned = torch.view_as_complex(states_HTD.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(turned).flatten(-2)
    first, second = states_HTD.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_attention_with_neighbours_turned_is_attention_with_halves_turned() -> None:
    """Four query heads share two of keys; weights and biases are reordered as llama.cpp expects them."""
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, generator = Model("LlamaForCausalLM", config), torch.Generator().manual_seed(0)

    def scores(neighbours: bool) -> Tensor:
        generator.manual_seed(0)
        inputs_TI = torch.randn(6, 32, generator=generator, dtype=torch.float64)
        states = []
        for name, heads in (("q_proj", 4), ("k_proj", 2)):
            weight = torch.randn(heads * 8, 32, generator=generator, dtype=torch.float64)
            bias = torch.randn(heads * 8, generator=generator, dtype=torch.float64)
            if neighbours:
                weight = model.reorder(f"model.layers.0.self_attn.{name}.weight", weight)
                bias = model.reorder(f"model.layers.0.self_attn.{name}.bias", bias)
            states.append(rotate((inputs_TI @ weight.T + bias).view(6, heads, 8).transpose(0, 1), neighbours))
        return states[0] @ states[1].repeat_interleave(2, 0).transpose(1, 2)

    assert torch.allclose(scores(True), scores(False), rtol=0, atol=1e-12)
    assert not torch.allclose(scores(False), scores(True).roll(1, 0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("architecture", "moves"), [("MistralForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_rows_move_together_and_back(architecture: str, moves: bool) -> None:
    kind = "mistral" if moves else "qwen3"
    config = {"model_type": kind, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 16}
    model = Model(architecture, config)
    for module, rows, touched in (("q_proj", 64, moves), ("k_proj", 32, moves), ("v_proj", 32, False)):
        name = f"model.layers.1.self_attn.{module}.weight"
        codes_OI = torch.randint(-8, 8, (rows, 64), dtype=torch.int8)
        scale_OG, zero_OG = torch.rand(rows, 2).half(), torch.randint(-8, 8, (rows, 2), dtype=torch.int8)
        tensor = QTensor(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG, scheme=Scheme.parse("W4A16g32"))
        turned = model.reorder_codes(name, tensor)
        assert torch.equal(model.restore(name, turned.dequantize(torch.float32)), tensor.dequantize(torch.float32))
        assert torch.equal(turned.codes_OI, tensor.codes_OI) is not touched
    assert model.name("model.layers.1.self_attn.k_proj.bias") == "blk.1.attn_k.bias"


def test_scaled_rotary_frequencies() -> None:
    """LLaMA 3.1: short waves stay, those longer than the old context are stretched by the factor."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 4, "rope_parameters": rope}
    model = Model("LlamaForCausalLM", {**config, "max_position_embeddings": 131072})
    factors = model.rope_factors()
    assert model.refusal() is None and factors is not None and factors.shape == (64,)
    for i, factor in enumerate(factors.tolist()):
        wave = 2 * math.pi * 500000.0 ** (i / 64)
        blend = min(1.0, max(0.0, (8192 / wave - 1) / 3))
        assert factor == pytest.approx(1 / (blend + (1 - blend) / 8), rel=1e-5)
    assert "llama3" in (Model("Qwen2ForCausalLM", {**config, "model_type": "qwen2"}).refusal() or "")


# --- tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def a_tokenizer(steps: list[Any], *, whole_words: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, [], ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return core


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("steps", "whole_words", "name"),
    [
        ([WORDS], False, "gpt-2"),
        ([pre_tokenizers.Digits(True), WORDS], False, "smollm"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES], True, "llama-bpe"),
        ([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES], False, "qwen2"),
        ([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES], True, None),
        ([pre_tokenizers.Split(Regex(QWEN2), "removed"), BYTES], False, None),
        ([pre_tokenizers.Split(Regex(r"\s+"), "isolated"), BYTES], False, None),
        ([pre_tokenizers.Digits(False), WORDS], False, None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], False, None),
        ([pre_tokenizers.Whitespace()], False, None),
    ],
)
def test_how_text_is_split(steps: list[Any], whole_words: bool, name: str | None, tmp_path: Path) -> None:
    tokenizer = a_tokenizer(steps, whole_words=whole_words)
    assert gguf_vocab.pre_tokenizer(json.loads(tokenizer.to_str())) == name
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reason = gguf_vocab.refusal(tmp_path, 256)
    assert (reason is None) == (name is not None) and (name or "none of gpt-2, smollm, llama-bpe, qwen2" in str(reason))


def test_the_name_of_qwens_own_tokenizer() -> None:
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Qwen2Tokenizer(vocab=vocabulary, merges=[]).backend_tokenizer
    assert gguf_vocab.pre_tokenizer(json.loads(core.to_str())) == "qwen2"


def test_tokenizers_of_another_kind(tmp_path: Path) -> None:
    Tokenizer(models.WordPiece({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert "not byte-level BPE" in (gguf_vocab.refusal(tmp_path, 1) or "")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert gguf_vocab.refusal(tmp_path, 259) is None
    assert gguf_vocab.refusal(tmp_path, 258) == "its tokenizer has token 258, its embedding 258 rows"
