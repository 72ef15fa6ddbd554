"""The output folder: one shard per block, each whole or absent, so that a run can die at any instant.

While a run is under way the folder holds its marker and the finished shards; config.json, without which nothing
loads it, comes last. A marker that names another run keeps the folder safe from this one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from makeweight.errors import UserError, first_line
from makeweight.export import manifest
from makeweight.export.claim import Claimant, check
from makeweight.models.shards import INDEX
from makeweight.paths import MARKER, RECIPE, expanded, locked, read_json, settle

REPORTS = "blocks.json"
UNSEALED = ".manifest.json"
"""The manifest of a folder whose record is being written again."""
NOTE = "export.json"
"""What was written from which solved folder."""
OWN = (MARKER, REPORTS, NOTE, RECIPE, "record.json", manifest.NAME)
"""What is added to a folder besides the model; a model quantized again must not pass them on."""

Verify = Callable[[Mapping[str, Tensor]], None]


class Folder:
    """An output folder claimed by one run, known by the hash of all that decides its bytes."""

    def __init__(self, path: Path, shards: int) -> None:
        self.path, self.shards = path, shards

    @classmethod
    def claim(cls, path: str | Path, run: Claimant, *, shards: int) -> Folder:
        """Take a new or empty folder, or go on with one that the same run began on the same kind of device.

        It holds the recipe from now on. Raises UserError where the folder holds anything else.
        """
        check(path, run)
        folder = cls(expanded(path), shards)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            with folder.alone():
                check(path, run)  # another run may have been faster
                if folder.marker() is None:
                    folder._write_json(MARKER, {**run.marks(), "done": False})
                if not folder.done:
                    folder.write_text(RECIPE, run.recipe.to_json())
        except OSError as error:
            raise UserError(f"{path} cannot be made a folder ({error.strerror}): give another --out.") from error
        return folder

    def marker(self) -> dict[str, Any] | None:
        """Return what the folder's marker says, or None where there is none."""
        return read_json(self.path / MARKER)

    @property
    def done(self) -> bool:
        """Whether everything has been written."""
        return bool((self.marker() or {}).get("done"))

    def alone(self) -> AbstractContextManager[bool]:
        """Keep other processes out of the folder meanwhile; raises UserError where another run holds it."""
        return locked(self.path, wait=False)

    def threads(self, mine: int) -> int:
        """Return how many threads the run began with; a new one notes `mine`."""
        marker = self.marker() or {}
        if not isinstance(begun := marker.get("threads"), int):
            self._write_json(MARKER, {**marker, "threads": mine})
            return mine
        return begun

    def shard(self, index: int) -> Path:
        """Return the path of a shard; 0 holds what lies outside the blocks, i + 1 block i."""
        return self.path / f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(
        self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any], verify: Verify | None = None
    ) -> None:
        """Write a shard, which appears whole or not at all, after its JSON report.

        `verify` gets the tensors as they are read back, before the file has its name, and raises where they are wrong.
        The report lies beside the shard and not in it: it holds times, and equal runs write equal shards.
        """
        from safetensors.torch import load_file

        self._write_json(REPORTS, {**self._reports(), str(index): report})
        part = self.shard(index).with_suffix(".part")
        save_tensors(tensors, part, {"format": "pt"})
        if verify is not None:
            verify(load_file(part))
        settle(part, self.shard(index))

    def _reports(self) -> dict[str, Any]:
        return read_json(self.path / REPORTS) or {}

    def report(self, index: int) -> dict[str, Any] | None:
        """Return the report of a finished shard, or None where it has not been written."""
        return self._reports().get(str(index)) if self.shard(index).is_file() else None

    def read(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a finished shard; raises UserError where it is damaged."""
        return _load(self.shard(index))

    def finish(
        self, config: Mapping[str, Any], side_files: Sequence[Path], root: Path, texts: Mapping[str, str]
    ) -> None:
        """Drop scratch files, write the index, copy files from `root`, write texts, then config.json; mark it done."""
        weight_map: dict[str, str] = {}
        for index in range(self.shards):
            weight_map |= dict.fromkeys(_names(self.shard(index)), self.shard(index).name)
        for file in self.path.glob("*.scratch*"):
            file.unlink()
        size = sum(self.shard(index).stat().st_size for index in range(self.shards))
        self._write_json(INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        copy_files(side_files, root, self.path)
        for name, text in texts.items():
            self.write_text(name, text)
        self._write_json("config.json", config)
        self._write_json(MARKER, {**(self.marker() or {}), "done": True})

    @property
    def finetuned(self) -> dict[str, float] | None:
        """What learning of the whole network reported, None before it is in every shard."""
        return (self.marker() or {}).get("finetuned")

    @property
    def refining(self) -> bool:
        """Whether shards hold, or may hold, what was learned of the whole network."""
        marker = self.marker() or {}
        return bool(marker.get("refining")) or "finetuned" in marker

    def holds(self, name: str) -> bool:
        """Whether tensors were set aside under a name."""
        return (self.path / name).is_file()

    def scratch(self, name: str) -> dict[str, Tensor] | None:
        """Return tensors that were set aside, or None."""
        return _load(self.path / name) if self.holds(name) else None

    def set_aside(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name until tuning is finished; the file appears whole or not at all."""
        part = self.path / f"{name}.part"
        save_tensors(tensors, part)
        settle(part, self.path / name)

    def begin_refining(self) -> None:
        """Note that shards are about to take what was learned of the whole network."""
        self._write_json(MARKER, {**(self.marker() or {}), "refining": True})

    def forget(self, shards: Iterable[int], scratch: Iterable[str]) -> None:
        """Drop shards and what was set aside, then, so that a run that dies forgets the rest, that refining began."""
        for file in (*map(self.shard, shards), *(self.path / name for name in scratch)):
            file.unlink(missing_ok=True)
        marker = self.marker() or {}
        self._write_json(MARKER, {key: marker[key] for key in marker.keys() - {"refining", "finetuned"}})

    def finish_tuning(self, report: Mapping[str, float]) -> None:
        """Note that every shard holds what was learned; `finish` drops what was set aside."""
        self._write_json(MARKER, {**(self.marker() or {}), "finetuned": dict(report)})

    @property
    def solved_by(self) -> dict[str, Any]:
        """What was noted of the process that solved last; empty before."""
        return (self.marker() or {}).get("solved_by") or {}

    def note_solver(self, facts: Mapping[str, Any]) -> None:
        """Note what the process that solves is and the most memory that it, or one that died before it, has taken."""
        peaks = [max(pair) for pair in zip(facts["peaks"], self.solved_by.get("peaks", facts["peaks"]), strict=True)]
        self._write_json(MARKER, {**(self.marker() or {}), "solved_by": {**facts, "peaks": peaks}})

    def unseal(self) -> None:
        """Put the manifest aside before the folder changes: without it, the same command finishes the change."""
        if self.sealed:
            (self.path / manifest.NAME).replace(self.path / UNSEALED)

    def seal(self) -> None:
        """Write the manifest of the folder, its last file; of what was sealed before only what was written anew."""
        old = self.path / UNSEALED
        self.write_text(manifest.NAME, manifest.renew(self.path, old) if old.is_file() else manifest.build(self.path))
        old.unlink(missing_ok=True)

    @property
    def vouched(self) -> bool:
        """Whether a manifest of the weights is there, in its place or put aside."""
        return self.sealed or (self.path / UNSEALED).is_file()

    @property
    def sealed(self) -> bool:
        """Whether a manifest is there."""
        return (self.path / manifest.NAME).is_file()

    def size(self) -> int:
        """Return the bytes of all shards."""
        return sum(self.shard(index).stat().st_size for index in range(self.shards))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file; it appears whole or not at all."""
        part = self.path / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        settle(part, self.path / name)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; raises OSError, which safetensors' own error is not, where the disk takes no more."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(file)) from error


def damaged(file: Path) -> UserError:
    """Return what to say of a file of an unfinished run that is not what was written."""
    return UserError(f"{file} is not what was written: delete this one file, and the same command makes it again.")


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except SafetensorError:
        raise damaged(file) from None


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError:
        raise damaged(file) from None


def copy_files(files: Iterable[Path], root: Path, folder: Path) -> None:
    """Copy files that lie in or below `root` to the same places of a folder."""
    for file in files:
        target = folder / file.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(file, part)
        settle(part, target)
