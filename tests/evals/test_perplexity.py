"""Streamed perplexity is the model's own loss."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from makeweight.calib import data
from makeweight.calib.walk import blocks_of
from makeweight.errors import UserError
from makeweight.evals import perplexity as room
from makeweight.evals import predictions
from makeweight.models.load import open_checkpoint
from makeweight.numerics.grid import round_tokens
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from tests.runs import a_text, small
from tests.tiny import tiny_folder

VOCABULARY, TOKENS = 128, 40
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = SHAPE | {
    "head_dim": 8,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 8,
}


class FakeCheckpoint:
    """A checkpoint whose file is a model in memory; counts the blocks that hold weights at once."""

    name = "fake"
    activations = 16
    rows = VOCABULARY

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.spec = SimpleNamespace(blocks="model.layers")
        self.n_blocks = len(blocks_of(model, "model.layers"))
        self.loaded: set[int] = set()
        self.most = 0

    def tokenizer(self) -> None:
        return None

    def start_token(self, tokenizer: None) -> None:
        return tokenizer

    def skeleton(self) -> nn.Module:
        skeleton = copy.deepcopy(self.model)
        blocks_of(skeleton, self.spec.blocks).to("meta")
        return skeleton

    def load_block(self, skeleton: nn.Module, index: int) -> nn.Module:
        block = blocks_of(skeleton, self.spec.blocks)[index]
        block.load_state_dict(copy.deepcopy(blocks_of(self.model, self.spec.blocks)[index].state_dict()), assign=True)
        self.loaded.add(index)
        self.most = max(self.most, len(self.loaded))
        return block

    def unload_block(self, skeleton: nn.Module, index: int) -> None:
        blocks_of(skeleton, self.spec.blocks)[index].to("meta")
        self.loaded.remove(index)


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    if name == "gemma2":
        options: dict[str, Any] = {"attn_implementation": "eager", "final_logit_softcapping": 5.0}
        return Gemma2ForCausalLM(Gemma2Config(**GEMMA, **options)).eval()
    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)).eval()


def windows(count: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def loss(model: Any, tokens_NT: Tensor) -> float:
    return float(torch.stack([model(input_ids=w[None], labels=w[None]).loss.double() for w in tokens_NT]).mean())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_streamed_equals_whole(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "LOGIT_BYTES", 4 * VOCABULARY * chunk)
    model, tokens_NT = build(name), windows(5)
    ckpt: Any = FakeCheckpoint(model)
    result = room.perplexity(ckpt, tokens_NT, dtype=torch.float32, device="cpu", batch=2)
    assert result == pytest.approx(math.exp(loss(model, tokens_NT)), rel=1e-6)
    assert ckpt.most == 1 and not ckpt.loaded


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_bf16_file_evaluates_in_float32_and_in_bf16(name: str) -> None:
    model, tokens_NT = build(name).bfloat16(), windows(4)
    ckpt: Any = FakeCheckpoint(model)
    # `.bfloat16()` also rounded the rotary tables, which no loader does: give both sides the rounded ones.
    wide = copy.deepcopy(model).float()
    exact = room.perplexity(ckpt, tokens_NT, dtype=torch.float32)
    assert exact == pytest.approx(math.exp(loss(wide, tokens_NT)), rel=1e-6)
    rough = room.perplexity(ckpt, tokens_NT, dtype=torch.bfloat16)
    assert rough == pytest.approx(exact, rel=2e-2) and rough != exact


def test_a_broken_model_is_infinite() -> None:
    model = build("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    ckpt: Any = FakeCheckpoint(model)
    assert room.perplexity(ckpt, windows(2), dtype=torch.float32) == math.inf
    model.model.norm.weight.data.fill_(1e6)
    assert room.perplexity(ckpt, windows(2), dtype=torch.float32) == math.inf


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> FakeCheckpoint:
    """`evaluate` opens this model, and reads these texts."""
    ckpt = FakeCheckpoint(build("llama"))
    load = pytest.importorskip("makeweight.models.load")
    monkeypatch.setattr(load, "open_checkpoint", lambda _, **options: ckpt)
    texts = {"a": windows(5)[:3], "b": windows(5)[3:]}
    monkeypatch.setattr(data, "evaluation_windows", lambda _, name, *, seqlen, windows: texts[name][:windows, :seqlen])
    return ckpt


def test_evaluate_serves_all_texts_in_one_pass(opened: FakeCheckpoint, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    room.evaluate("model", datasets=["a"], seqlen=TOKENS, device="cpu")
    assert capfd.readouterr() == ("", "")
    results = room.evaluate(
        "model",
        datasets=["a", "b"],
        seqlen=TOKENS,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 4) for i in range(1, 5)]
    assert [(r.dataset, r.windows, r.tokens, r.seqlen) for r in results] == [("a", 3, 120, 40), ("b", 2, 80, 40)]
    for result, tokens_NT in zip(results, (windows(5)[:3], windows(5)[3:]), strict=True):
        assert result.nll == pytest.approx(loss(opened.model, tokens_NT), rel=1e-6)
        assert result.perplexity == math.exp(result.nll) and result.seconds > 0 and result.dtype == "float32"
    (rough,) = room.evaluate("model", datasets=["a"], seqlen=TOKENS, device="cpu", dtype=torch.bfloat16)
    assert rough.dtype == "bfloat16" and rough.nll != results[0].nll


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"datasets": ["a"], "seqlen": 65}, "seqlen=65 is longer than the 64 positions of fake"),
        ({"datasets": []}, "name at least one"),
        ({"datasets": ["a"], "device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_refusals(opened: FakeCheckpoint, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        room.evaluate("model", **({"seqlen": TOKENS, "device": "cpu"} | options))


def test_a_model_that_is_no_chain_of_blocks_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("it changes the hidden states between its blocks.")

    folder, text = tiny_folder("llama", tmp_path / "model"), a_text(tmp_path / "text.txt")
    monkeypatch.setattr(room, "check_replay", refuse)
    with pytest.raises(UserError, match="between its blocks"):
        room.evaluate(str(folder), datasets=[str(text)], seqlen=32, windows=1)


def test_eight_bit_activations_are_rounded_as_the_runtime_will(tmp_path: Path) -> None:
    model, text = tiny_folder("llama", tmp_path / "model"), a_text(tmp_path / "words.txt")
    quantize(small(model, tmp_path / "out", text, method="rtn", scheme=Scheme.parse("W8A8"), blocks=(0, 2)))
    ckpt = open_checkpoint(tmp_path / "out")
    assert ckpt.activations == 8
    windows_NT = torch.arange(64).reshape(2, 32) * 11 % 256
    measured = room.perplexity(ckpt, windows_NT, dtype=torch.float32)

    whole = ckpt.skeleton()
    for i in range(ckpt.n_blocks):
        block = ckpt.load_block(whole, i)
        for name in ckpt.linears() if i < 2 else ():
            block.get_submodule(name).register_forward_pre_hook(lambda _, given: (round_tokens(given[0], 8),))
    whole.float()
    losses = [float(whole(input_ids=row[None], labels=row[None]).loss) for row in windows_NT]
    assert measured == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    ckpt.activations = 16
    assert measured != pytest.approx(room.perplexity(ckpt, windows_NT, dtype=torch.float32), rel=1e-4)
