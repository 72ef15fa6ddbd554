"""Whose an output folder is: nobody's while it is new or empty, then the run's that its marker names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from makeweight.errors import UserError
from makeweight.paths import MARKER, RECIPE, expanded

NEVER_COUNT = ("model", "out", "eval", "formats", "trust_remote_code", "calib.dataset", "tune.device")
"""Parts of a recipe that do not make it another run: the model and the text count by what they hold."""
ABSENT = "not given"


def check(path: str | Path, *, identity: str, device: str, recipe: str = "{}") -> None:
    """Raise UserError for a folder that another run holds, or something else; nothing is written.

    The recipe, in JSON, is for saying in what the other run differs.
    """
    check_place(path)
    folder = expanded(path)
    found = read_json(folder / MARKER)
    if found is None:
        return
    if found.get("identity") != identity:
        other = another(read_json(folder / RECIPE) or {}, json.loads(recipe))
        raise UserError(f"{folder} belongs to a run with another {other}: give another --out, or delete it.")
    if not found.get("done") and (began := found.get("device", device)) != device:
        # Devices differ in the last bits: what is finished has its bytes, the rest would get others.
        raise UserError(f"{folder} was begun on {began}, not on {device}: finish it there, or delete it.")


def check_place(path: str | Path) -> None:
    """Raise UserError for a folder that holds what no run wrote; asks for nothing that takes long to know."""
    folder = expanded(path)
    if read_json(folder / MARKER) is not None:
        return
    try:
        strangers = {item.name for item in folder.iterdir()} - {f"{MARKER}.part"}
    except FileNotFoundError:
        strangers = set[str]()
    except OSError as error:
        if not folder.is_file():
            raise UserError(f"{path} cannot be made a folder ({error.strerror}): give another --out.") from error
        strangers = {folder.name}
    if strangers:
        raise UserError(f"{folder} already holds something else: give a new or an empty folder as --out.")


def another(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Say in what two runs differ: the first part of their recipes that does, where there is one."""
    if not there:
        return "recipe, model, text or version of makeweight"
    theirs, ours = dict(_parts(there)), dict(_parts(here))
    for name in sorted({*theirs, *ours}):
        pair = [json.dumps(found[name]) if name in found else ABSENT for found in (theirs, ours)]
        if pair[0] != pair[1]:
            return f"recipe ({name} is {pair[0]} there and {pair[1]} here)"
    return "model, text or version of makeweight"


def _parts(recipe: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what counts in a recipe by its dotted name."""
    for key, value in recipe.items():
        name = f"{above}{key}"
        if name in NEVER_COUNT:
            continue
        if isinstance(value, Mapping):
            yield from _parts(value, f"{name}.")
        else:
            yield name, value


def read_json(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds, None where it is missing, unreadable or no mapping."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
