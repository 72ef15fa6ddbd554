"""Text that has a name: public data sets, and two texts that ship inside CPython, its reference and its library."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from makeweight.errors import UserError, did_you_mean, first_line

Split = Literal["train", "test"]
"""What the text is for: "train" calibrates; "test" is the part held out, whatever name the source gives it."""

PYTHON_DOCS = "python-docs"
PYTHON_CODE = "python-code"
LOCAL = (PYTHON_DOCS, PYTHON_CODE)
"""Two domains that are on every machine, both with the parts train and validation."""
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_LOCAL = "a local .txt, .jsonl or .parquet file"
_SHARED_PARAGRAPH = 40
"""Shorter paragraphs ("For example:") may occur on both sides of the python-docs split."""


@dataclass(frozen=True, kw_only=True)
class HubText:
    """Where a public data set lies, and how the field reads it.

    `parts` maps a part to the file that holds it ("" where the hub knows the part by name). `joiner` and `limit`
    (documents per part) follow the field's loaders, so that perplexities compare, and so does `windows`, how many of
    the held-out part count where nobody says (C4: the first 256 of its first 1100 validation documents joined by
    spaces, known as "c4-new"; PTB: its test sentences joined by spaces).
    """

    path: str
    parts: Mapping[str, str]
    held_out: str | None
    config: str | None = None
    revision: str | None = None
    column: str = "text"
    joiner: str = "\n\n"
    limit: Mapping[str, int] = field(default_factory=dict)
    windows: int | None = None


HUB: dict[str, HubText] = {
    "wikitext2": HubText(
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        parts={"train": "", "validation": "", "test": ""},
        held_out="test",
    ),
    "c4": HubText(
        path="allenai/c4",
        parts={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        held_out="validation",
        joiner=" ",
        limit={"train": 5000, "validation": 1100},
        windows=256,
    ),
    "ptb": HubText(
        path="ptb-text-only/ptb_text_only",
        # The repository itself is a loading script, which `datasets` no longer runs; this is the hub's own conversion.
        revision="refs/convert/parquet",
        parts={part: f"penn_treebank/{part}/0000.parquet" for part in ("train", "validation", "test")},
        held_out="test",
        column="sentence",
        joiner=" ",
    ),
    "pile-10k": HubText(path="NeelNanda/pile-10k", parts={"train": ""}, held_out=None),
}
NAMES = (*HUB, *LOCAL)


def read_named(name: str, part: str, split: Split) -> list[str]:
    """Read the documents of one of `NAMES`.

    `part` is what the user wrote after the colon, or "" to follow `split`. Raises UserError for a part that does not
    exist and for whatever keeps the text from being fetched.
    """
    parts = ("train", "validation") if name in LOCAL else tuple(HUB[name].parts)
    if part and part not in parts:
        hint = did_you_mean(part, parts)
        raise UserError(f"{name} has no part {part!r}{hint}: choose {' or '.join(f'{name}:{p}' for p in parts)}.")
    part = part or usual_part(name, split)
    if not part:
        raise UserError(f"{name} has no part that is held out: evaluate on another text, such as wikitext2.")
    if name in LOCAL:
        return _python_docs(part) if name == PYTHON_DOCS else _python_code(part)
    return _download(name, part)


def usual_part(name: str, split: Split) -> str:
    """Return the part of one of `NAMES` that is meant where nobody says; "" where none is held out."""
    held_out = "validation" if name in LOCAL else HUB[name].held_out
    return "train" if split == "train" else held_out or ""


def _download(name: str, part: str) -> list[str]:
    hub = HUB[name]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{name} needs the package datasets: pip install datasets, or give {_LOCAL}.") from error
    limit = hub.limit.get(part)
    files = {part: hub.parts[part]} if hub.parts[part] else None
    try:
        rows: Any = load_dataset(
            hub.path, hub.config, split=part, data_files=files, revision=hub.revision, streaming=limit is not None
        )
        return [row[hub.column] for row in islice(rows, limit)]
    except (
        Exception
    ) as error:  # the hub's clients raise types of four libraries; all mean "no data", and the cause is told
        raise UserError(
            f"{name}:{part} could not be fetched ({first_line(error)}): check the network, "
            f"or give {_LOCAL}, which needs none."
        ) from error


def _python_docs(part: str) -> list[str]:
    """One part of the language reference inside CPython: about 3/4 of the topics train, the others are held out.

    Long topics quote short ones whole ("compound" holds "if"), so every paragraph is given to the shortest topic that
    has it; without that, a split by topic would evaluate on calibration text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("python-docs is missing from this Python (pydoc_data): give a local file instead.") from error
    seen: set[str] = set()
    own: dict[str, str] = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        kept: list[str] = []
        for paragraph in _PARAGRAPH_BREAK.split(topics[topic].strip()):
            words = " ".join(paragraph.split())
            if len(words) < _SHARED_PARAGRAPH or words not in seen:
                kept.append(paragraph)
            seen.add(words)
        own[topic] = "\n\n".join(kept)
    held_out = part == "validation"
    return [own[topic] for topic in sorted(own) if own[topic] and _is_held_out(topic, among=4) == held_out]


def _python_code(part: str) -> list[str]:
    """One part of the top-level modules of CPython's standard library, as source: about 1/16 is held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_")]
    if not files:
        raise UserError(f"python-code is missing: {folder} holds no sources; give a local file instead.")
    chosen = [file for file in files if _is_held_out(file.name, among=16) == (part == "validation")]
    return [file.read_text(encoding="utf-8", errors="replace") for file in chosen]


def _is_held_out(name: str, *, among: int) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % among == 0
