"""Activations of 8 bits while methods learn: the streams, moments and losses see what a runtime will."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from makeweight.calib.stream import Stream
from makeweight.evals.predictions import predict
from makeweight.models import attention
from makeweight.models.load import open_checkpoint
from makeweight.numerics.grid import round_tokens
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval
from makeweight.sweep.inputs import Moments
from makeweight.sweep.run import Sweep
from tests.runs import a_text, small
from tests.sweep.problem import CPU, problem
from tests.tiny import tiny_folder


def test_a_block_rounds_what_enters_its_linears_once_its_weights_are_others() -> None:
    block = replace(problem().blocks[0], activations=8)
    own, hidden_BTD = block.state(), problem().hidden_NTD[:2]
    with torch.no_grad():
        before, rounded = block(hidden_BTD), block(hidden_BTD, own)
        handles = [
            block.module.get_submodule(name).register_forward_pre_hook(lambda _, given: (round_tokens(given[0], 8),))
            for name in block.linears
        ]
        by_hand = block(hidden_BTD)
        for handle in handles:
            handle.remove()
        assert torch.equal(rounded, by_hand) and not torch.equal(rounded, before)
        assert torch.equal(block(hidden_BTD), before), "the original reads what it always has"
        assert torch.equal(replace(block, activations=16)(hidden_BTD, own), before)
        block.write(own)
        assert torch.equal(block(hidden_BTD), rounded)


def test_moments_are_of_rounded_inputs() -> None:
    setting = problem()
    block, hidden_NTD = setting.blocks[0], setting.hidden_NTD
    moments = [
        Moments(replace(block, activations=bits), block.state(), hidden_NTD, 4, CPU).moment("self_attn.q_proj")
        for bits in (8, 16)
    ]
    normed_MI = block.module.get_submodule("input_layernorm")(hidden_NTD).flatten(0, 1)
    rounded_MI = round_tokens(normed_MI, 8)
    torch.testing.assert_close(moments[0], rounded_MI.T @ rounded_MI / len(rounded_MI))
    assert not torch.equal(moments[0], moments[1])


@pytest.mark.parametrize("method", ["flipround", "let+gptq"])
def test_the_stream_is_what_evaluation_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    streams: list[Tensor] = []
    tokens: list[Tensor] = []
    begin, step = Sweep.__init__, Stream.step

    def noting_tokens(self: Sweep, *given: object) -> None:
        tokens.append(given[2])  # pyright: ignore[reportArgumentType]
        begin(self, *given)  # pyright: ignore[reportArgumentType]

    def noting_stream(self: Stream, committed: object) -> None:
        step(self, committed)  # pyright: ignore[reportArgumentType]
        streams.append(self.quantized_NTD)

    monkeypatch.setattr(attention, "_FASTER", ())  # another order of sums may round an activation another way
    monkeypatch.setattr(Sweep, "__init__", noting_tokens)
    monkeypatch.setattr(Stream, "step", noting_stream)
    model, text = tiny_folder("llama", tmp_path / "model", dtype=torch.float32), a_text(tmp_path / "words.txt")
    recipe = small(model, tmp_path / "out", text, method=method, scheme=Scheme.parse("W8A8"), eval=Eval(datasets=()))
    quantize(replace(recipe, tune=replace(recipe.tune, dtype="float32")))
    found = predict(open_checkpoint(tmp_path / "out"), tokens[0], dtype=torch.float32)
    torch.testing.assert_close(streams[-1], found.hidden_NTD)


def test_learning_of_the_whole_network_begins_with_what_activations_lose(tmp_path: Path) -> None:
    """The weights are the same; only what enters the linears differs."""
    model, text = tiny_folder("llama", tmp_path / "model", dtype=torch.float32), a_text(tmp_path / "words.txt")
    before: dict[str, float] = {}
    for scheme in ("W8A16_sym", "W8A8"):
        recipe = small(model, tmp_path / scheme, text, method="rtn+e2e", scheme=Scheme.parse(scheme))
        recipe = replace(recipe, eval=Eval(datasets=()), options={"e2e": {"steps": 1}})
        before[scheme] = quantize(recipe).finetune["before"]
    assert before["W8A8"] > 1.2 * before["W8A16_sym"]
