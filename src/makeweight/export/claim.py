"""Whose an output folder is: nobody's while it is new or empty, then the run's that its marker names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makeweight.errors import UserError
from makeweight.paths import MARKER, RECIPE, expanded, read_json
from makeweight.recipe import Recipe

NEVER_COUNT = ("model", "out", "eval", "formats", "trust_remote_code", "calib.dataset", "tune.device")
"""Parts of a recipe that do not make it another run: the model and the text count by what they hold."""
ABSENT = "not given"


@dataclass(frozen=True, kw_only=True)
class Claimant:
    """A run that wants a folder: the hash of all that decides its bytes, its recipe, and what it computes on and in."""

    identity: str
    recipe: Recipe
    device: str
    dtype: str

    def marks(self) -> dict[str, str]:
        """Return what a folder notes of the run that took it."""
        return {"identity": self.identity, "device": self.device, "dtype": self.dtype}


def check(path: str | Path, run: Claimant) -> None:
    """Raise UserError for a folder that another run holds, or something else; nothing is written."""
    check_place(path)
    folder = expanded(path)
    found = read_json(folder / MARKER)
    if found is None:
        return
    if found.get("identity") != run.identity:
        raise UserError(
            f"{folder} belongs to a run with another {another(folder, run.recipe)}: give another --out, or delete it."
        )
    if found.get("done"):
        return
    # What is finished has its bytes; the rest would get others.
    if (began := found.get("device", run.device)) != run.device:
        raise UserError(f"{folder} was begun on {began}, not on {run.device}: finish it there, or delete it.")
    if (began := found.get("dtype", run.dtype)) != run.dtype:
        raise UserError(
            f"{folder} was begun in {began}, and this machine works in {run.dtype}: finish it on one of the kind "
            "where it was begun, or delete it."
        )


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


def deciding(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe that decide the bytes of weights, as plain data.

    A dtype that follows the device counts as bfloat16: the folder notes what it was, until everything is solved. What
    `e2e` keeps for the way back changes no byte, so that a run which is short of memory goes on.
    """
    data: dict[str, Any] = json.loads(recipe.to_json())
    for name in NEVER_COUNT:
        part, _, key = name.rpartition(".")
        del (data[part] if part else data)[key]
    if data["tune"]["dtype"] == "auto":
        data["tune"]["dtype"] = "bfloat16"
    for given in data["options"].values():
        given.pop("recompute", None)
    data["options"] = {name: given for name, given in data["options"].items() if given}
    return data


def another(folder: Path, recipe: Recipe) -> str:
    """Say in what the run that holds a folder differs from one of a recipe: the parts of both that do, where known."""
    try:
        theirs = dict(_parts(deciding(Recipe.load(folder / RECIPE))))
    except UserError:
        return "recipe, model, text or version of makeweight"
    ours = dict(_parts(deciding(recipe)))
    found = []
    for name in sorted({*theirs, *ours}):
        there, here = (json.dumps(parts[name]) if name in parts else ABSENT for parts in (theirs, ours))
        if there != here:
            found.append(f"{name} is {there} there and {here} here")
    return f"recipe ({', '.join(found)})" if found else "model, text or version of makeweight"


def _parts(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield plain data by dotted name."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
