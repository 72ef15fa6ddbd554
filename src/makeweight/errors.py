"""The one exception whose text is meant for users."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake: its text names the input, says what is wrong and what to do.

    The command line prints the text as one sentence and exits with code 2; besides it only OSError is caught there.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for a near miss among `known`, and "" where nothing is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
