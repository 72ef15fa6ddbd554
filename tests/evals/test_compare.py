"""How far a model's predictions are from its original's is what whole logits say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from makeweight.calib.data import evaluation_windows
from makeweight.errors import UserError
from makeweight.evals import perplexity as room
from makeweight.evals import predictions
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval
from makeweight.report.record import Record
from tests.runs import our_logits, small
from tests.tiny import VOCABULARY, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("known_rate")


@pytest.fixture
def record(llama: Path, text: Path, tmp_path: Path) -> Record:
    measured = Eval(datasets=(str(text),), seqlen=48, windows=3)
    return quantize(small(llama, tmp_path / "out", text, method="rtn", scheme=Scheme.parse("W3A16g32"), eval=measured))


@pytest.mark.parametrize("chunk", [1000, 7])
def test_a_record_has_the_divergence_of_whole_logits(
    chunk: int, record: Record, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "LOGIT_BYTES", 4 * VOCABULARY * chunk)
    texts = room.Texts(datasets=(str(text),), seqlen=48, windows=3, device="cpu")
    (result,), (original,) = room.compare(record.path, str(llama), texts)
    tokens_NT = evaluation_windows(open_checkpoint(llama).tokenizer(), str(text), seqlen=48, windows=3)
    ours, theirs = (our_logits(folder, tokens_NT)[:, :-1].double() for folder in (record.path, llama))
    exact = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True) / (3 * 47)
    assert result.divergence == pytest.approx(float(exact), rel=0.02) and exact > 0.01  # hidden states are bfloat16
    assert result.same_top == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), abs=0.02)
    assert original.divergence is None
    assert original.perplexity == pytest.approx(record.baselines[0].perplexity, rel=1e-5)
    assert result.divergence == pytest.approx(record.perplexities[0].divergence or 0, rel=1e-5)
    assert result.perplexity == pytest.approx(record.perplexities[0].perplexity, rel=1e-5)


def test_a_model_is_no_way_from_itself(llama: Path, text: Path) -> None:
    seen: list[tuple[int, int]] = []
    texts = room.Texts(datasets=(str(text),), seqlen=48, windows=2, device="cpu")
    (result,), (original,) = room.compare(str(llama), str(llama), texts, lambda done, all_: seen.append((done, all_)))
    assert result.divergence == 0 and result.same_top == 1 and result.perplexity == original.perplexity
    assert seen == [(step, 6) for step in range(1, 7)]


def test_the_record_says_it_in_words(record: Record) -> None:
    share: Any = record.perplexities[0].same_top
    assert f"the likeliest next token is the original's {100 * share:.0f} % of the time" in record.verdict()
    assert Record.load(record.path) == record


def test_models_that_read_other_tokens_are_not_compared(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = room.Texts(datasets=(str(text),), seqlen=48, windows=2, device="cpu")
    first = texts.open(str(llama))
    answers = iter([first, replace(first, windows_NT=torch.zeros_like(first.windows_NT))])
    monkeypatch.setattr(room.Texts, "open", lambda *_: next(answers))
    monkeypatch.setattr(room.Texts, "read", lambda *_: pytest.fail("nothing is computed first"))
    with pytest.raises(UserError, match="m reads other tokens than o: compare models that share a tokenizer"):
        room.compare("m", "o", texts)


def test_models_that_predict_more_tokens_are_not_compared(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = AutoModelForCausalLM.from_pretrained(llama)
    padded.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    texts = room.Texts(datasets=(str(text),), seqlen=48, windows=2, device="cpu")
    monkeypatch.setattr(room.Texts, "read", lambda *_: pytest.fail("nothing is computed first"))
    with pytest.raises(UserError, match=f"padded predicts {VOCABULARY + 8} tokens and .* {VOCABULARY}: compare"):
        room.compare(str(tmp_path / "padded"), str(llama), texts)
