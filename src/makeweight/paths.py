"""Paths as users write them, folders that runs write and hold, files brought to the disk."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from makeweight.errors import UserError

MARKER, RECIPE = "makeweight.json", "recipe.json"
"""The first files of a folder that a run writes: whose it is, and what the run was asked for."""


def expanded(path: str | Path) -> Path:
    """Return a path with its ~ replaced by a home directory; raises UserError where there is none, or no path."""
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} is not a path: a null character cannot be part of one.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} names the home directory of nobody here: give the path without ~.") from error


def read_json(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds, None where it is missing, unreadable or no mapping."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_finished(folder: Path) -> None:
    """Raise UserError for a folder that a run has begun and not finished; says how it goes on."""
    marker = read_json(folder / MARKER)
    if marker is None or marker.get("done"):
        return
    again = ""
    if (folder / RECIPE).is_file():
        given = (shlex.quote(str(part)) for part in (folder / RECIPE, folder))
        again = ", or from where that was `makeweight quantize --recipe {} --out {}`".format(*given)
    raise UserError(f"{folder} is not finished: run the same `makeweight quantize` again{again}.")


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes out of a folder meanwhile; the system forgets the lock of one that dies.

    Where another has it, waits for it or raises UserError. Yields False on systems and disks that know no such lock.
    """
    handle = _lock(folder, wait=wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, *, wait: bool) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with suppress(OSError):  # some network disks have no locks
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"{folder} is being written by another run: wait for it, or give another --out."
                ) from None
            return None
        return handle
    return None


def to_disk(file: Path) -> None:
    """Bring a written file to the disk, whatever happens to the machine afterwards."""
    with file.open("r+b") as stream:  # Windows brings only what is open for writing to the disk
        os.fsync(stream.fileno())


def settle(part: Path, final: Path) -> None:
    """Bring a file to the disk, then to its name: after a power cut it is whole or absent."""
    to_disk(part)
    mask = os.umask(0)
    os.umask(mask)
    part.chmod(0o666 & ~mask)  # safetensors makes its files private
    part.replace(final)
