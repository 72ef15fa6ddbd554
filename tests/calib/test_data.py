"""Text sources: what is read, what is drawn from it, and every refusal."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from makeweight.calib import data
from makeweight.calib.data import behind, calibration_tokens, evaluation_windows, read_text, same_text, token_stream
from makeweight.calib.named import HUB, NAMES
from makeweight.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that a text's tokens can be counted by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=8)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A file of 1000 four-byte numbers: "0000" to "0999"."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i:04d}" for i in range(1000)))
    return str(path)


def decoded(tokenizer: PreTrainedTokenizerFast, tokens_T: torch.Tensor) -> str:
    return str(tokenizer.decode(tokens_T))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_txt_documents_are_parted_by_two_blank_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "one\n\nstill one\n\n\ntwo\n \n\t\n\n\nthree\n")
    assert read_text(source) == ["one\n\nstill one", "two", "three\n"]


def test_txt_is_evaluated_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.txt", "one\n\n\n\ntwo\n")
    assert tokenizer.decode(token_stream(tokenizer, source, split="test")) == "one\n\n\n\ntwo\n"
    assert tokenizer.decode(token_stream(tokenizer, source, split="train")) == "one\n\ntwo\n"


def test_jsonl_reads_text_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": [{"type": "text", "text": "say"}]}]
    rows = [{"text": "plain\u2028line"}, {"messages": chat}, {"text": " "}]
    source = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_text(source) == ["plain\u2028line", "ask\n\nsay"]
    half = write(tmp_path / "b.jsonl", '{"text": "cut \\ud83d"}')
    assert read_text(half) == ["cut ?"], "no tokenizer takes half of a character"


def test_parquet_reads_the_text_column(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.parquet")) == ["a", "b"]
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="columns 'body'"):
        read_text(str(tmp_path / "b.parquet"))
    parquet.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet holds list in its column 'text': give one that holds strings\."):
        read_text(str(tmp_path / "c.parquet"))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet cannot be read"):
        read_text(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n\n", "holds no text"),
        ("empty.jsonl", b"", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text .byte 3"),
        ("keys.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}', "line 2 holds the keys 'body', 'id'"),
        ("list.jsonl", b"[1]", "line 1 holds a list"),
        ("broken.jsonl", b'{"text": ', "line 1 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("long.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        ("broken.parquet", b"PAR1 but no more", "cannot be read"),
        ("a.csv", b"text", "give a file ending in"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_text(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("wikitext-2", "did you mean 'wikitext2'"),
        ("nowhere.txt", "cannot be read"),
        ("wikitext2:tset", "did you mean 'test'"),
        ("python-docs:test", "choose python-docs:train or python-docs:validation"),
        (".", "is not a text"),
    ],
)
def test_bad_names_are_refused(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_text(source)


def test_pile_has_nothing_to_evaluate_on() -> None:
    with pytest.raises(UserError, match="no part that is held out"):
        read_text("pile-10k", split="test")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for `datasets` that answers every call and notes it."""
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append({"path": path, "config": config, **options})
        return [{"text": f"document {i}", "sentence": f"sentence {i}"} for i in range(3000)]

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_names_know_their_parts(hub: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(read_text("wikitext2")) == 3000
    assert len(read_text("c4", split="test")) == 1100
    read_text("wikitext2:validation", split="test")
    assert read_text("ptb", split="test")[0] == "sentence 0"
    assert [call["split"] for call in hub] == ["train", "validation", "validation", "test"]
    assert [call["streaming"] for call in hub] == [False, True, False, False]
    assert tokenizer.decode(token_stream(tokenizer, "c4", split="test")[:21]) == "document 0 document 1"


@pytest.mark.usefixtures("hub")
def test_as_much_of_c4_is_evaluated_as_others_do(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(evaluation_windows(tokenizer, "c4", seqlen=16)) == 256
    assert len(evaluation_windows(tokenizer, "c4:validation", seqlen=16, windows=300)) == 300
    assert len(evaluation_windows(tokenizer, "wikitext2", seqlen=16)) > 300


@pytest.mark.parametrize("name", HUB)
def test_a_hub_that_fails_names_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match=r"could not be fetched \(no route\).*local"):
        read_text(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets.*local"):
        read_text(name)


def test_python_docs_keeps_its_parts_apart() -> None:
    train, validation = read_text("python-docs"), read_text("python-docs", split="test")
    assert train == read_text("python-docs:train", split="test")
    assert 0.1 < sum(map(len, validation)) / sum(map(len, train + validation)) < 0.4

    def paragraphs(documents: list[str]) -> set[str]:
        words = (" ".join(p.split()) for document in documents for p in document.split("\n\n"))
        return {w for w in words if len(w) >= 40}

    assert len(paragraphs(validation)) > 100
    assert not paragraphs(train) & paragraphs(validation)


def test_crops_are_disjoint_and_seeded(tokenizer: PreTrainedTokenizerFast, numbers: str) -> None:
    def draw(seed: int) -> torch.Tensor:
        return calibration_tokens(tokenizer, numbers, nsamples=30, seqlen=100, seed=seed)

    crops = draw(0)
    assert crops.shape == (30, 100) and crops.dtype == torch.int64
    assert torch.equal(crops, draw(0))
    assert not torch.equal(crops, draw(1))
    text = Path(numbers).read_text()
    starts = sorted(text.index(decoded(tokenizer, crop)) for crop in crops)
    assert all(b - a >= 100 for a, b in pairwise(starts))
    assert len({start % 100 for start in starts}) == 1


def test_the_last_token_counts(tokenizer: PreTrainedTokenizerFast, numbers: str) -> None:
    crops = calibration_tokens(tokenizer, numbers, nsamples=40, seqlen=100, seed=3)
    assert min(decoded(tokenizer, crop) for crop in crops).startswith("0000")
    with pytest.raises(UserError, match="holds 4000 tokens but 41 samples of 100 need 4100"):
        calibration_tokens(tokenizer, numbers, nsamples=41, seqlen=100, seed=3)
    with pytest.raises(UserError, match="nsamples=0"):
        calibration_tokens(tokenizer, numbers, nsamples=0, seqlen=100, seed=3)


def test_windows_are_adjacent_and_drop_the_tail(tokenizer: PreTrainedTokenizerFast, numbers: str) -> None:
    windows = evaluation_windows(tokenizer, numbers, seqlen=300)
    assert windows.shape == (13, 300)
    assert tokenizer.decode(windows.flatten()) == Path(numbers).read_text()[:3900]
    assert torch.equal(evaluation_windows(tokenizer, numbers, seqlen=300, windows=2), windows[:2])
    with pytest.raises(UserError, match="holds 4000 tokens but one window needs 4001"):
        evaluation_windows(tokenizer, numbers, seqlen=4001)
    with pytest.raises(UserError, match="seqlen=1 "):
        evaluation_windows(tokenizer, numbers, seqlen=1)


def test_long_streams_raise_no_warning(
    tokenizer: PreTrainedTokenizerFast, numbers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    token_stream(tokenizer, numbers, split="test")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_names_are_complete() -> None:
    assert set(NAMES) == {"wikitext2", "c4", "ptb", "pile-10k", "python-docs", "python-code"}


def test_python_code_is_a_second_domain_with_disjoint_parts() -> None:
    train, held_out = (set(read_text(f"python-code:{part}")) for part in ("train", "validation"))
    assert not train & held_out
    assert sum(map(len, train)) > 10 * sum(map(len, held_out)) > 1_000_000 / 10
    assert any("def " in module for module in held_out)


def test_long_calibration_text_is_tokenised_in_parts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts end where a line does, or else anywhere; what begins a stream is there once."""
    text = "ab\n" * 20 + "c" * 50 + "\nd"
    source = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(data, "TOGETHER", 16)
    seen: list[tuple[str, bool]] = []

    def spy(part: str, *, add_special_tokens: bool, **options: Any) -> Any:
        seen.append((part, add_special_tokens))
        return tokenizer(part, add_special_tokens=add_special_tokens, **options)

    stream = token_stream(spy, source, split="train")  # pyright: ignore[reportArgumentType]
    assert decoded(tokenizer, stream) == text
    assert max(len(part) for part, _ in seen) <= 16 and [first for _, first in seen] == [True] + [False] * 7
    assert all(part.endswith("\n") for part, _ in seen[:4])


def test_a_model_that_needs_its_first_token_gets_it_in_every_sample() -> None:
    tokens_NT = torch.arange(6).view(2, 3)
    assert behind(9, tokens_NT).tolist() == [[9, 1, 2], [9, 4, 5]] and tokens_NT[0, 0] == 0
    assert behind(None, tokens_NT) is tokens_NT


@pytest.mark.parametrize(
    ("calibrated", "measured", "same"),
    [
        ("a.txt", "./a.txt", True),
        ("a.txt", "b.txt", False),
        ("wikitext2", "wikitext2", False),
        ("wikitext2:test", "wikitext2", True),
        ("wikitext2", "wikitext2:train", True),
        ("python-docs", "python-docs", False),
        ("python-docs:validation", "python-docs", True),
        ("python-docs", "wikitext2", False),
    ],
)
def test_which_texts_are_the_same(calibrated: str, measured: str, same: bool) -> None:
    assert same_text(calibrated, measured) is same
