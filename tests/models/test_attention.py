"""A learning model's attention is transformers' own up to rounding, and its very bits wherever ours does not apply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2PreTrainedModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from makeweight.models import attention
from makeweight.models.attention import _attention, speed_up
from makeweight.models.load import open_checkpoint
from tests.tiny import FAMILIES, tiny_folder, tiny_model


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward(input_ids=tokens, use_cache=False).logits.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_what_transformers_computes(family: str) -> None:
    model, ours = tiny_model(family).eval(), speed_up(tiny_model(family).eval())
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(2))
    exact = _logits(model.double(), tokens)
    assert torch.equal(_logits(ours.double(), tokens), exact), "float64 is left to torch"
    left_to_torch = family in ("gemma2", "mistral")  # soft caps, and a window of 8 that needs a mask
    for dtype, more in (("float", 1.5), ("bfloat16", 1.2)):
        theirs, mine = (_logits(getattr(found, dtype)(), tokens) for found in (model, ours))
        assert (mine - exact).norm() < more * (theirs - exact).norm()
        assert torch.equal(mine, theirs) == left_to_torch


@pytest.mark.parametrize("family", FAMILIES)
def test_families_go_on_from_what_they_keep_as_in_one_go(family: str) -> None:
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))
    exact, theirs = _logits(tiny_model(family).eval(), tokens), _logits(tiny_model(family).eval().bfloat16(), tokens)
    model, past, logits = speed_up(tiny_model(family).eval()).bfloat16(), None, []
    with torch.no_grad():
        for step in (tokens[:, :8], *tokens[:, 8:].split(1, dim=1)):
            answer = model(input_ids=step, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            logits.append(answer.logits[:, -1:])
    mine = torch.cat(logits, 1).double()
    assert (mine - exact[:, 7:]).norm() < 1.5 * (theirs - exact)[:, 7:].norm()


def test_models_that_take_no_other_attention_keep_theirs() -> None:
    class Rigid(LlamaForCausalLM):
        _supports_attention_backend = False

    config = tiny_model("llama").config
    assert isinstance(config, LlamaConfig)
    assert speed_up(Rigid(config)).config._attn_implementation == "sdpa"
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    assert speed_up(eager).config._attn_implementation == "eager"


class _Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def _inputs(dtype: torch.dtype = torch.bfloat16, queries: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, 2, 12, 8), (2, 2, 12, 8))
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


CASES: dict[str, tuple[dict[str, Any], Callable[[], tuple[Tensor, Tensor, Tensor]]]] = {
    "mask": ({"attention_mask": torch.ones(12, 12, dtype=torch.bool).tril(2).triu(-3)}, _inputs),
    "not causal": ({"is_causal": False}, _inputs),
    "float64": ({}, lambda: _inputs(torch.float64)),
    "more queries than one, fewer than keys": ({}, lambda: _inputs(queries=5)),
    "bias": ({"position_bias": torch.linspace(0, 1, 12).expand(1, 1, 12, 12).bfloat16()}, _inputs),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_plainly_causal_is_left_to_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("not ours")

    monkeypatch.setattr(attention, "causal_attention", refuse)
    monkeypatch.setattr(attention, "last_token_attention", refuse)
    named, make = CASES[case]
    inputs = make()
    named = {"attention_mask": None, "scaling": 0.3, "dropout": 0.0, **named}  # some families name the mask
    ours, _ = _attention(_Layer(), *inputs, **named)
    theirs, _ = sdpa_attention_forward(_Layer(), *inputs, **named)
    assert torch.equal(ours, theirs)


def test_elsewhere_than_on_a_processor_slopes_are_added_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[bool, ...]] = []

    def answer(*_: Any, **__: Any) -> tuple[Tensor, None]:
        cuda = torch.backends.cuda
        allowed.append((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()))
        return torch.empty(0), None

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", answer)
    query, key, value = (tensor.to("meta") for tensor in _inputs())
    _attention(_Layer(), query, key, value, None)
    with torch.no_grad():
        _attention(_Layer(), query, key, value, None)
    assert allowed == [(False,) * 3, (True,) * 3]


def test_a_soft_cap_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its releases refuse it, others leave it out."""
    seen: list[Any] = []

    def answer(*_: Any, **named: Any) -> tuple[Tensor, None]:
        seen.append(named["softcap"])
        return torch.empty(0), None

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", answer)
    _attention(_Layer(), *_inputs(), None, softcap=30.0)
    assert seen == [30.0]


def test_scores_that_are_capped_are_computed_where_the_cap_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a release of transformers says that the class can do."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    ckpt = open_checkpoint(tiny_folder("gemma2", tmp_path))
    assert ckpt.config.attn_logit_softcapping is not None
    assert ckpt.skeleton().config._attn_implementation == "eager"
