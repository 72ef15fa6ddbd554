"""Captured inputs replay every block exactly, and the model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from makeweight.calib.capture import (
    _cast,  # pyright: ignore[reportPrivateUsage]
    _same,  # pyright: ignore[reportPrivateUsage]
    capture,
    check_replay,
    find_device,
    finish,
    for_batch,
    hidden_of,
    run_block,
)
from makeweight.calib.walk import blocks_of
from makeweight.errors import UserError

VOCABULARY, TOKENS = 64, 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = SHAPE | {
    "head_dim": 8,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 8,
}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def llama(attention: str = "sdpa") -> nn.Module:
    options: dict[str, Any] = {"attn_implementation": attention}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **options))


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False))


def falcon() -> nn.Module:
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=False
    )
    return FalconForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (llama, "model.layers"),
    "llama-eager": (lambda: llama("eager"), "model.layers"),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, **EAGER)), "model.layers"),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)), "model.layers"),
    "opt": (opt, "model.decoder.layers"),
    "falcon": (falcon, "transformer.h"),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, str]:
    """A model, the same with its blocks on the meta device, and where they are."""
    torch.manual_seed(0)
    make, path = MODELS[request.param]
    model = make().eval()
    skeleton = copy.deepcopy(model)
    blocks_of(skeleton, path).to("meta")
    return model, skeleton, path


def tokens(count: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_replay_equals_the_model(case: tuple[nn.Module, nn.Module, str]) -> None:
    model, skeleton, path = case
    tokens_NT = tokens()
    captured = capture(skeleton, path, tokens_NT, dtype=torch.float32, batch_size=2)
    hidden = captured.hidden_NTD
    assert hidden.shape[:2] == (5, TOKENS)
    for block, kwargs in zip(blocks_of(model, path), captured.kwargs, strict=True):
        alone = torch.cat([run_block(block, sample, kwargs) for sample in hidden.split(1)])
        hidden = run_block(block, hidden, kwargs)
        torch.testing.assert_close(hidden, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(finish(skeleton, path, hidden), model(tokens_NT).logits, atol=1e-5, rtol=1e-5)
    part = finish(skeleton, path, hidden[:1, 5:9])
    torch.testing.assert_close(part, model(tokens_NT[:1]).logits[:, 5:9], atol=1e-5, rtol=1e-5)


def test_blocks_are_put_back(case: tuple[nn.Module, nn.Module, str]) -> None:
    _, skeleton, path = case
    before = list(blocks_of(skeleton, path))
    capture(skeleton, path, tokens())
    assert all(a is b for a, b in zip(before, blocks_of(skeleton, path), strict=True))


def test_blocks_are_put_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    before = list(blocks_of(model, "model.layers"))

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model.get_submodule("model.rotary_emb"), "forward", broken)
    with pytest.raises(ZeroDivisionError):
        capture(model, "model.layers", tokens())
    assert all(a is b for a, b in zip(before, blocks_of(model, "model.layers"), strict=True))


def test_kwargs_differ_by_block_and_hold_no_cache() -> None:
    torch.manual_seed(0)
    model = MODELS["gemma3"][0]().eval()
    captured = capture(model, "model.layers", tokens(), dtype=torch.bfloat16)
    sliding, full, again = (captured.kwargs[i] for i in range(3))
    assert captured.hidden_NTD.dtype == torch.bfloat16
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])
    assert sliding["position_embeddings"][0].dtype == torch.bfloat16
    assert sliding["attention_mask"] is not None and sliding["attention_mask"].shape[0] == 1
    # What blocks share is stored once.
    assert sliding["attention_mask"] is again["attention_mask"]
    for kwargs in captured.kwargs:
        assert kwargs.get("past_key_values") is None
        assert not kwargs.get("use_cache")


def test_positional_arguments_get_their_names() -> None:
    class Block(nn.Module):
        attention_type = "full"

        def forward(self, hidden_states: Tensor, scale: float, past_key_value: object, *, shift: float) -> Tensor:
            return hidden_states * scale + shift

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 4)
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            hidden = self.embed(input_ids)
            for index, layer in enumerate(self.layers):
                assert layer.attention_type == "full"
                hidden = layer(hidden, 2.0 + index, object(), shift=1.0)
            return hidden

    captured = capture(Model(), "layers", tokens())
    assert captured.kwargs == tuple({"scale": s, "past_key_value": None, "shift": 1.0} for s in (2.0, 3.0))


def test_arguments_that_depend_on_the_text_are_refused() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, extra: Tensor) -> Tensor:
            return hidden_states + extra

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 4)
            self.layers = nn.ModuleList([Block()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            hidden = self.embed(input_ids)
            return self.layers[0](hidden, extra=hidden)

    with pytest.raises(UserError, match="block 0 an argument 'extra' that depends on the samples"):
        capture(Model(), "layers", tokens())


def test_arguments_that_are_wider_for_more_samples_are_refused() -> None:
    """BLOOM's slopes come as samples times heads in one dimension."""
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UserError, match="block 0 an argument 'alibi' that depends on the samples"):
        capture(model, "transformer.h", tokens(2), dtype=torch.float32)


def test_hidden_of_takes_tensors_and_tuples() -> None:
    hidden = torch.ones(1, 2, 3)
    assert hidden_of(hidden) is hidden
    assert hidden_of((hidden, None)) is hidden


def test_arguments_may_differ_in_the_last_bit_of_two_passes() -> None:
    cosines = torch.linspace(-1, 1, 64).view(1, 8, 8).bfloat16()
    assert _same(cosines, torch.cat([cosines, cosines * (1 + 2**-8)]))
    assert not _same(cosines, torch.cat([cosines, cosines.flip(1)]))
    assert not _same(torch.arange(8)[None], torch.arange(1, 9)[None])


def test_masks_are_repeated_for_a_batch() -> None:
    kwargs = {"attention_mask": torch.ones(1, 1, 4, 4), "position_ids": torch.arange(4).unsqueeze(0)}
    whole = for_batch(kwargs, 3)
    assert whole["attention_mask"].shape == (3, 1, 4, 4) and whole["position_ids"] is kwargs["position_ids"]
    assert for_batch({"attention_mask": None}, 3) == {"attention_mask": None}


def test_masks_and_tables_are_cast_without_loss_or_overflow() -> None:
    exact = torch.tensor([1 / 3, -2.0], dtype=torch.float64)
    assert torch.equal(_cast(exact, torch.float64), exact)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for other in (torch.float16, torch.bfloat16, torch.float32):
            hidden = torch.tensor([0.0, torch.finfo(dtype).min]).to(dtype)
            assert torch.isfinite(_cast(hidden, other)).all()


class Odd(nn.Module):
    """A model of two blocks that goes through them `rounds` times and adds `between` before the second."""

    def __init__(self, rounds: int = 1, between: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.layers = nn.ModuleList([Passing(), Passing()])
        self.rounds, self.between = rounds, between

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed(input_ids)
        for _ in range(self.rounds):
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden + self.between * index)
        return hidden


class Passing(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"rounds": 2}, "does not call its blocks once each"),
        ({"between": 0.5}, "changes the hidden states between its blocks"),
    ],
)
def test_models_that_are_no_chain_of_blocks_are_refused(odd: dict[str, Any], why: str) -> None:
    check_replay(Odd(), "layers")
    with pytest.raises(UserError, match=why):
        check_replay(Odd(**odd), "layers")


def test_a_gpu_that_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.ones

    def ones(*size: int, device: str) -> Tensor:
        if device == "cuda":
            raise RuntimeError("no kernel image is available for execution on the device")
        return real(*size, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'cuda' cannot be used here"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="device 'cuda' is there and fails: give cpu"):
        find_device("auto")
