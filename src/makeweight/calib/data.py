"""Text in, token ids out: calibration crops and evaluation windows.

A source is a local file (`.txt`, `.raw`, `.jsonl`, `.parquet`), the name of a public data set (`wikitext2`, `c4`,
`ptb`, `pile-10k`, with an optional part as in `wikitext2:test`), or `python-docs` or `python-code`,
which need no network.
Shapes: N samples or windows, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from makeweight.calib.named import HUB, NAMES, Split, read_named, usual_part
from makeweight.errors import UserError, did_you_mean, first_line
from makeweight.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from makeweight.models.checkpoint import Checkpoint

TEXT_SUFFIXES = (".txt", ".raw")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
TOGETHER = 1 << 23
"""Characters of calibration text that are tokenised at once: a tokenizer takes tens of bytes of memory for each."""
_DOCUMENT_BREAK = re.compile(r"\n(?:[ \t]*\n){2,}")


def read_text(source: str, *, split: Split = "train") -> list[str]:
    """Read the documents of a local file or of a named data set.

    `split` chooses the part of a named data set unless the name says it (`wikitext2:test`); a local file has one part.
    A `.txt` holds documents separated by two or more blank lines; a `.jsonl` holds them under `text`, or as a chat
    under `messages`; a `.parquet` in its column `text`. Raises UserError where there is no text to be had.
    """
    name, _, part = source.partition(":")
    path = expanded(source)
    if name in NAMES:
        documents = read_named(name, part, split)
    elif path.suffix.lower() in SUFFIXES:
        documents = _read_file(path)
    elif path.exists():
        raise UserError(f"{source} is not a text this program can read: give a file ending in {', '.join(SUFFIXES)}.")
    else:
        raise UserError(
            f"text source {source!r} is neither a file nor a known name{did_you_mean(name, NAMES)}: "
            f"give a file ending in {', '.join(SUFFIXES)}, or one of {', '.join(NAMES)}."
        )
    if not any(document.strip() for document in documents):
        raise UserError(f"{source} holds no text: give a source with some.")
    return documents


def same_text(calibrated: str, measured: str) -> bool:
    """Say whether what one source gives to calibrate on is what another gives to measure on."""
    sources: tuple[tuple[str, Split], ...] = ((calibrated, "train"), (measured, "test"))
    found = []
    for source, split in sources:
        name, _, part = source.partition(":")
        found.append((name, part or usual_part(name, split)) if name in NAMES else expanded(source).resolve())
    return found[0] == found[1]


def token_stream(tokenizer: PreTrainedTokenizerBase, source: str, *, split: Split) -> Tensor:
    """Tokenise a source as one text, once: int64 [tokens].

    Documents are joined by a blank line; to evaluate on a local text file it is taken whole, as it is. The tokenizer's
    own special tokens are added once, at the start of the stream, not per window (conventions of GPTQ and OmniQuant).
    Long calibration text is tokenised in parts that end where a line does.
    """
    documents = read_text(source, split=split)
    path = expanded(source)
    name = source.partition(":")[0]
    if split == "test" and name not in NAMES and path.suffix.lower() in TEXT_SUFFIXES:
        text = _read_string(path)
    else:
        text = (HUB[name].joiner if name in HUB else "\n\n").join(documents)
    # verbose=False: the stream is longer than the model's context on purpose, and the tokenizer would warn about it.
    plain: dict[str, Any] = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    streams = [
        torch.tensor(tokenizer(part, add_special_tokens=not number, **plain)["input_ids"], dtype=torch.int64)
        for number, part in enumerate(_lines_together(text) if split == "train" else [text])
    ]
    return torch.cat(streams)


def behind(start: int | None, tokens_NT: Tensor) -> Tensor:
    """Return samples with the token that their model cannot do without in place of their first, None for no such."""
    return tokens_NT if start is None else torch.cat([torch.full_like(tokens_NT[:, :1], start), tokens_NT[:, 1:]], 1)


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str, *, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Draw `nsamples` random crops of `seqlen` tokens that do not overlap: int64 [N, T].

    The stream is cut into adjacent windows behind a random offset, and windows are drawn without replacement; the same
    seed gives the same crops. Raises UserError where the stream holds fewer than nsamples x seqlen tokens.
    """
    _check_positive(nsamples=nsamples, seqlen=seqlen)
    stream = token_stream(tokenizer, source, split="train")
    needed = nsamples * seqlen
    if len(stream) < needed:
        raise UserError(
            f"{source} holds {len(stream)} tokens but {nsamples} samples of {seqlen} need {needed}: "
            "give more text, or fewer or shorter samples."
        )
    generator = torch.Generator().manual_seed(seed)
    slack = min(seqlen - 1, len(stream) - needed)
    offset = int(torch.randint(slack + 1, (1,), generator=generator))
    windows_NT = _windows(stream[offset:], seqlen)
    chosen = torch.randperm(len(windows_NT), generator=generator)[:nsamples]
    return windows_NT[chosen].clone()


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, *, seqlen: int, windows: int | None = None
) -> Tensor:
    """Cut the held-out part of a source into adjacent windows of `seqlen` tokens, dropping the tail: int64 [N, T].

    `windows` keeps the first so many (fewer where the text is shorter), None as many as the field takes of a named data
    set, and else all. Raises UserError where the text is shorter than one window.
    """
    if seqlen < 2:
        raise UserError(f"seqlen={seqlen} leaves nothing to predict: give at least 2.")
    if windows is not None:
        _check_positive(windows=windows)
    stream = token_stream(tokenizer, source, split="test")
    if len(stream) < seqlen:
        raise UserError(
            f"{source} holds {len(stream)} tokens but one window needs {seqlen}: give more text, or a smaller seqlen."
        )
    usual = HUB.get(source.partition(":")[0])
    kept = usual.windows if windows is None and usual else windows
    return _windows(stream, seqlen)[:kept].clone()


def evaluation_texts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], *, seqlen: int, windows: int | Sequence[int] | None
) -> list[Tensor]:
    """Cut the held-out part of several sources into windows; `windows` is one number, one for each, or None for all."""
    counts = windows if isinstance(windows, Sequence) else [windows] * len(sources)
    if len(counts) != len(sources):
        raise UserError(f"{len(counts)} numbers of windows do not fit {len(sources)} texts: give one for each.")
    pairs = zip(sources, counts, strict=True)
    return [evaluation_windows(tokenizer, source, seqlen=seqlen, windows=count) for source, count in pairs]


def check_tokens(ckpt: Checkpoint, *tokens: Tensor) -> None:
    """Raise UserError where a text has a token that the model's embedding has no row for."""
    largest = max((int(part.max()) for part in tokens if part.numel()), default=0)
    if largest >= ckpt.rows:
        raise UserError(
            f"{ckpt.path} has a tokenizer that gives token {largest}, and an embedding of {ckpt.rows} rows: "
            "use the tokenizer that belongs to these weights."
        )


def _lines_together(text: str) -> Iterator[str]:
    """Cut a text where a line ends, or else anywhere, into parts of at most TOGETHER characters."""
    start = 0
    while len(text) - start > TOGETHER:
        end = text.rfind("\n", start, start + TOGETHER) + 1 or start + TOGETHER
        yield text[start:end]
        start = end
    yield text[start:]


def _windows(stream: Tensor, seqlen: int) -> Tensor:
    count = len(stream) // seqlen
    return stream[: count * seqlen].view(count, seqlen)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name}={number} is not possible: give a positive number.")


def _read_string(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a text file.") from error


def _read_file(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        documents = _DOCUMENT_BREAK.split(_read_string(path))
    elif suffix == ".jsonl":
        lines = enumerate(_read_string(path).split("\n"), start=1)
        documents = [_row_text(line, f"{path} line {number}") for number, line in lines if line.strip()]
    else:
        documents = _read_parquet(path)
    return [document for document in documents if document.strip()]


def _row_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", None) or first_line(error)
        raise UserError(f"{where} is not JSON ({said}): write one JSON object per line.") from error
    if isinstance(row, dict):
        text, messages = row.get("text"), row.get("messages")
        if isinstance(messages, list) and not isinstance(text, str):
            text = "\n\n".join(filter(None, map(_message_text, messages)))
        if isinstance(text, str):
            return text.encode(errors="replace").decode()  # JSON may hold half of a character
    found = f"the keys {', '.join(map(repr, row)) or '(none)'}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise UserError(f"{where} holds {found}: put a string under 'text', or a chat's list under 'messages'.")


def _message_text(message: Any) -> str:
    """The words of one chat message, whose content is a string or a list of typed parts."""
    content = message.get("content") if isinstance(message, dict) else message
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow, or give a .txt or .jsonl.") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns: list[str] = file.schema_arrow.names
            rows: list[Any] = file.read(columns=["text"])["text"].to_pylist() if "text" in columns else []
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): give an intact parquet file.") from error
    if "text" not in columns:
        raise UserError(f"{path} holds the columns {', '.join(map(repr, columns))}: name the one with text 'text'.")
    if others := {type(row).__name__ for row in rows} - {"str", "NoneType"}:
        raise UserError(f"{path} holds {min(others)} in its column 'text': give one that holds strings.")
    return [row for row in rows if row is not None]
