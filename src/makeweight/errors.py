"""The one exception whose text is meant for users, and how another is known that they can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 200
"""Letters of an error that a sentence quotes."""


class UserError(ValueError):
    """A user's mistake: its text names the input, says what is wrong and what to do.

    The command line prints the text as one sentence and exits with code 2; besides it only OSError and memory that
    ran out are caught there.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for a near miss among `known`, and "" where nothing is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, the GPU's or the system's: torch tells the latter by its text alone."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # the last by the GPU's own libraries
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def first_line(error: BaseException) -> str:
    """Return what fits into a sentence of an error's text: its first line, the next one too where that says more."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".:")[:LONGEST]
    kind = type(error).__name__
    return f"{kind} {text}".strip() if isinstance(error, LookupError) or not text else text
