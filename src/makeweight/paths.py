"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from makeweight.errors import UserError


def expanded(path: str | Path) -> Path:
    """Return a path with its ~ replaced by a home directory; raises UserError where there is none, or no path."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} is not a path: a null character cannot be part of one.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names the home directory of nobody here: give the path without ~.") from error
