"""Text that a model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from makeweight.calib import written
from makeweight.calib.written import writing_bytes, written_tokens
from makeweight.models.attention import speed_up
from makeweight.models.load import open_checkpoint
from makeweight.numerics import precision
from tests.tiny import FAMILIES, tiny_folder

CPU = torch.device("cpu")


def given(samples: int = 3, tokens: int = 20) -> Tensor:
    return torch.randint(0, 256, (samples, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_and_the_seed_decides_what(family: str, tmp_path: Path) -> None:
    ckpt = open_checkpoint(str(tiny_folder(family, tmp_path / "model")))
    first, again, other = (written_tokens(ckpt, given(), 4, device=CPU, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (4, 20) and first.dtype == torch.int64
    assert first.min() >= 0 and first.max() < ckpt.config.vocab_size
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_go_on_from_the_samples_and_half_begin_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "PROMPT", 5)
    ckpt = open_checkpoint(str(tiny_folder("llama", tmp_path / "model")))
    samples = given()
    starts = {tuple(row) for row in samples[:, :5].tolist()}
    pieces = written_tokens(ckpt, samples, 12, device=CPU, seed=0)
    followed = [row for row in pieces.tolist() if tuple(row[:5]) in starts]
    assert len(followed) == 6
    special = {256, 257, 258}
    assert not special & {row[0] for row in pieces.tolist()}


def test_tokens_are_drawn_from_the_models_own_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model so sure of itself that there is nothing to draw writes what is most likely, token by token."""
    monkeypatch.setattr(written, "PROMPT", 5)
    folder = tiny_folder("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    model.save_pretrained(folder)
    pieces = written_tokens(open_checkpoint(str(folder)), given(), 4, device=CPU, seed=0)
    with torch.no_grad():
        likely = model(input_ids=pieces).logits.argmax(-1)
    same = (likely[:, 4:-1] == pieces[:, 5:])[:2]  # those that go on from a sample
    assert same.float().mean() > 0.7  # all but near ties, in numbers of three digits


def test_long_samples_are_made_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "PIECE", 8)
    monkeypatch.setattr(written, "TOGETHER", 2)
    ckpt = open_checkpoint(str(tiny_folder("llama", tmp_path / "model")))
    ticks: list[tuple[int, int]] = []
    pieces = written_tokens(ckpt, given(), 3, device=CPU, seed=0, tick=lambda *at: ticks.append(at))
    assert pieces.shape == (3, 20)
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]  # eight pieces, of which each half is written in twos
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(ckpt.config).parameters())
    narrow, wide = [], []
    for units, found in ((True, narrow), (False, wide)):
        monkeypatch.setattr(precision, "_multiplies", lambda *_, units=units: units)
        found.append(writing_bytes(ckpt, 20, CPU))
    assert narrow[0] > 2 * weights and wide[0] - narrow[0] > 2 * weights


@pytest.mark.parametrize(("tokens", "count"), [(20, 1), (4, 3), (2, 1)])
def test_few_and_short_ones(tokens: int, count: int, tmp_path: Path) -> None:
    ckpt = open_checkpoint(str(tiny_folder("llama", tmp_path / "model")))
    assert written_tokens(ckpt, given(tokens=tokens), count, device=CPU, seed=0).shape == (count, tokens)


def test_tokens_come_as_often_as_they_are_likely_and_never_without_a_chance() -> None:
    chances = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(20000, -1)
    drawn = written._drawn(chances, torch.Generator().manual_seed(0))
    shares = drawn.flatten().bincount(minlength=6) / len(drawn)
    torch.testing.assert_close(shares, chances[0], rtol=0, atol=0.012)
    assert shares[[0, 2, 5]].eq(0).all()


def test_every_sample_begins_with_the_token_that_the_model_needs(tmp_path: Path) -> None:
    ckpt = open_checkpoint(str(tiny_folder("gemma2", tmp_path / "model")))
    assert ckpt.start_token(ckpt.tokenizer()) == 256
    assert written_tokens(ckpt, given(), 4, device=CPU, seed=0, start=256)[:, 0].tolist() == [256] * 4
    llama = open_checkpoint(str(tiny_folder("llama", tmp_path / "llama")))
    assert llama.start_token(llama.tokenizer()) is None


def test_the_head_gets_inputs_that_do_not_make_torch_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided ones did: 57 MB for each piece of SmolLM2."""
    seen: list[bool] = []

    def watched(model: Any) -> Any:
        speed_up(model).lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0].is_contiguous()))
        return model

    monkeypatch.setattr(written, "speed_up", watched)
    written_tokens(open_checkpoint(str(tiny_folder("llama", tmp_path / "model"))), given(), 4, device=CPU, seed=0)
    assert seen and all(seen)
