"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from makeweight.errors import UserError


def expanded(path: str | Path) -> Path:
    """Return a path with its ~ replaced by a home directory; raises UserError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names the home directory of nobody here: give the path without ~.") from error
