"""A tokenizer in GGUF's keys: byte-level BPE whose way of splitting words llama.cpp knows under a name.

llama.cpp splits by code of its own, chosen by that name, so the name is decided from the structure of tokenizer.json
and never guessed: other splits would shift tokens without an error. It leaves Unicode normalization (NFC) out.
Source: llama.cpp `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = (_SPLIT.replace("DIGITS", digits) for digits in (r"\p{N}{1,3}", r"\p{N}"))
NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((LLAMA3, "bytes"), True): "llama-bpe",
    ((QWEN2, "bytes"), False): "qwen2",
}
"""The name of each sequence of splits, with whether whole words are looked up before merges."""


def refusal(folder: Path, rows: int) -> str | None:
    """Return why a folder's tokenizer cannot be written for an embedding of `rows` tokens, as a clause, or None."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return "there is no tokenizer.json, without which llama.cpp reads no text"
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        model = tokenizer["model"]
    except (ValueError, KeyError, TypeError):
        return "its tokenizer.json cannot be read"
    odd = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type") != "BPE" or any(model.get(key) for key in odd):
        return "its tokenizer is not byte-level BPE"
    if pre_tokenizer(tokenizer) is None or (tokenizer.get("normalizer") or {}).get("type", "NFC") != "NFC":
        return f"its tokenizer splits text in a way that is none of {', '.join(NAMES.values())}"
    largest = max(_tokens(tokenizer))
    return None if largest < rows else f"its tokenizer has token {largest}, its embedding {rows} rows"


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer.json splits text, None where it has none."""
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = tuple(_step(step) for step in pre.get("pretokenizers", [pre]))
    return NAMES.get((steps, bool(tokenizer["model"].get("ignore_merges"))))


def _step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "words" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if not step.get("invert"):
            return pattern
        case _:
            return "unknown"


def _tokens(tokenizer: Mapping[str, Any]) -> dict[int, tuple[str, int]]:
    """Return text and type of every token by id; added ones override those of the vocabulary."""
    tokens = {index: (text, NORMAL) for text, index in tokenizer["model"]["vocab"].items()}
    for token in tokenizer.get("added_tokens", []):
        tokens[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    return tokens


def add(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Write a folder's tokenizer, one token for each of an embedding's rows, and its chat template where it has one."""
    from gguf import SpecialVocab
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    known, name = _tokens(tokenizer), pre_tokenizer(tokenizer)
    assert name is not None, folder
    tokens = [known.get(index, (f"[PAD{index}]", UNUSED)) for index in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    # What the tokenizer does counts; its files may say it in several ways or not at all.
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found, ids = tokenizer.encode("a").ids, special.special_token_ids
    special.add_special_token = {"bos": found[0] == ids.get("bos"), "eos": found[-1] == ids.get("eos")}
    special.add_to_gguf(writer, quiet=True)
