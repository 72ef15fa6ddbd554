"""From one solved folder to others: refuse first, write, read back, compare, and only then give it its name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from makeweight.errors import UserError, did_you_mean
from makeweight.export import manifest
from makeweight.export.base import Facts, Format, deviation
from makeweight.export.folder import NOTE, Folder
from makeweight.export.formats import FORMATS
from makeweight.export.hf import write_json
from makeweight.export.manifest import tensor_hash
from makeweight.export.solved import Solved
from makeweight.paths import expanded, to_disk


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One folder that was written and compared: what it holds, its bytes, and how far a weight lies off at most.

    `deviation` is in steps of the scale; 0 means every weight is equal bit for bit.
    """

    format: str
    path: Path
    linears: int
    kept: int
    bytes: int
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether a format can hold a model: why not, or "" where it can, and what loads it."""

    format: str
    refusal: str
    exact: bool
    loads: tuple[str, ...]
    weights_only: bool
    """Whether activations, which the model rounds, stay as they are."""

    def words(self) -> tuple[str, str, str]:
        """Return the format, whether it holds the model, and what loads it then."""
        if self.refusal:
            return self.format, f"no: {self.refusal}", ""
        held = "exactly" if self.exact else "rounded"
        return self.format, held + (", its weights alone" if self.weights_only else ""), "; ".join(self.loads)


def can_export(solved: Solved) -> list[Answer]:
    """Ask every format about a solved folder; nothing is written."""
    return [
        Answer(
            format=name,
            refusal=form.refusal(solved.facts) or "",
            exact=form.tolerance(solved.facts) == 0,
            loads=form.loads(solved.facts),
            weights_only=_weights_only(form, solved.facts),
        )
        for name, form in FORMATS.items()
    ]


def _weights_only(form: Format, facts: Facts) -> bool:
    return facts.scheme.activations < 16 and not form.rounds_activations


def export_model(path: str | Path, formats: Sequence[str], *, out: str | Path | None = None) -> list[Exported]:
    """Write a solved folder in other formats, each into `out`/<format> (None: beside it, as <folder>-<format>).

    Nothing is solved again, and what an earlier call wrote from the same folder is not written again unless it is
    damaged. Raises UserError, before anything is written, for a format that is unknown or cannot hold the model, and
    for a folder that holds something else, or a solved one that another process is using; RuntimeError where what was
    written reads back differently.
    """
    if isinstance(formats, str):
        raise UserError(f"formats={formats!r} is one name where a list of them belongs: put it in brackets.")
    if not formats:
        return []
    solved = Solved(path)
    with Folder(solved.path, 0).alone():
        return write_formats(solved, formats, out=out)


def write_formats(solved: Solved, formats: Sequence[str], *, out: str | Path | None = None) -> list[Exported]:
    """Do what `export_model` does, for a caller that keeps other processes out of the solved folder itself."""
    targets = check(solved.path, formats, solved.facts, identity=solved.identity, out=out)
    alone = [form.name for form, _ in targets if _weights_only(form, solved.facts)]
    if alone:
        rounded = f"activations, which {solved.path.name} has rounded to {solved.facts.scheme.activations} bits"
        print(f"Only weights are held by {', '.join(alone)}: {rounded}, stay as they are there.", file=sys.stderr)
    written = [(form, target, _sound(target, solved)) for form, target in targets]
    for _, target, found in written:
        if found is None and (others := manifest.strangers(target)):
            raise UserError(
                f"{target} is to be written anew, but holds what makeweight did not write ({others[0]}): "
                "move that elsewhere, or give another --out."
            )
    return [found or _export(form, solved, target) for form, target, found in written]


def check(
    path: Path, formats: Sequence[str], facts: Facts, *, identity: str, out: str | Path | None = None
) -> list[tuple[Format, Path]]:
    """Return the formats and the folders that they go into, for the run known by `identity`.

    Raises UserError, as `export` does; what is known of a model only when it is solved is left for then.
    """
    whole = expanded(path).resolve()
    chosen = [(form, target_of(path, form.name, out)) for form in map(known, dict.fromkeys(formats))]
    for form, target in chosen:
        if whole in (target.resolve(), *target.resolve().parents):
            raise UserError(f"{target} lies in the folder that is exported: give another --out.")
        if reason := form.refusal(facts):
            raise UserError(f"{form.name} cannot hold {path.name} at {facts.scheme}: {reason}.")
        if target.exists() and _earlier(target, identity) is None:
            raise UserError(f"{target} already holds something else: give another --out, or delete it.")
    return chosen


def target_of(solved: Path, form: str, out: str | Path | None) -> Path:
    """Return the folder that a format is written into."""
    whole = expanded(solved).resolve()
    return expanded(out) / form if out else whole.with_name(f"{whole.name}-{form}")


def _earlier(target: Path, identity: str) -> dict[str, Any] | None:
    """Return what an earlier call noted of what it wrote from the same run, None where it did not."""
    try:
        found = json.loads((target / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("solved") == identity else None


def _sound(target: Path, solved: Solved) -> Exported | None:
    """Return what an earlier call wrote, None where that is nothing, or damaged, or of a config edited since."""
    found = _earlier(target, solved.identity)
    if found is None or found.pop("beside", None) != solved.beside or not (target / manifest.NAME).is_file():
        return None
    if manifest.check(target, strangers=False):
        return None
    del found["solved"]
    return Exported(**found, path=target)


def known(name: str) -> Format:
    """Return a format by its name, or refuse in a sentence."""
    if name not in FORMATS:
        raise UserError(f"format {name!r} is unknown{did_you_mean(name, FORMATS)}: choose among {', '.join(FORMATS)}.")
    return FORMATS[name]


def _export(form: Format, solved: Solved, target: Path) -> Exported:
    part, old = (target.with_name(f"{target.name}.{kind}") for kind in ("part", "old.part"))
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)  # what an interrupted run left
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made a folder ({error.strerror}): give another --out.") from error
    try:
        done = _filled(form, solved, part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)  # a disk that is full is not left full
        if isinstance(error, OSError) and error.filename is None:  # as writing to a full disk raises it
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise
    if target.exists():  # of the same run, and damaged or out of date
        target.replace(old)
    part.replace(target)
    shutil.rmtree(old, ignore_errors=True)
    return done


def _filled(form: Format, solved: Solved, part: Path, target: Path) -> Exported:
    """Write a format into `part`, which is to become `target`, and compare it with what was solved."""
    form.write(solved, part)
    shutil.copyfile(solved.path / "recipe.json", part / "recipe.json")
    worst = _compare(form, solved, part)
    kept = _compare_kept(form, solved, part)
    size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    done = Exported(format=form.name, path=target, linears=len(solved.names), kept=kept, bytes=size, deviation=worst)
    note = {name: value for name, value in asdict(done).items() if name != "path"}
    write_json(part / NOTE, {**note, "solved": solved.identity, "beside": solved.beside})
    (part / manifest.NAME).write_text(manifest.build(part), encoding="utf-8")
    for file in filter(Path.is_file, part.rglob("*")):
        to_disk(file)  # before the folder gets its name
    return done


def _compare(form: Format, solved: Solved, folder: Path) -> float:
    """Return the largest deviation of a linear that is read back, or raise RuntimeError where one is too large."""
    expected = (pair for part in solved.parts() for pair in part.quantized.items())
    tolerance, worst = form.tolerance(solved.facts), 0.0
    for ours, theirs in zip_longest(expected, form.read(solved, folder)):
        if ours is None or theirs is None or ours[0] != theirs[0]:
            raise RuntimeError(f"{folder} does not hold the linears that were solved")
        off = deviation(theirs[1], ours[1])
        if not off <= tolerance:
            raise RuntimeError(f"{ours[0]} reads back differently from {folder}: {off:.3g} steps off")
        worst = max(worst, off)
    return worst


def _compare_kept(form: Format, solved: Solved, folder: Path) -> int:
    """Return how many other tensors were written, or raise RuntimeError where one is missing or has another value."""
    written = {name: tensor_hash(tensor.float()) for name, tensor in form.read_kept(solved, folder)}
    expected = {name: tensor_hash(tensor.float()) for part in solved.parts() for name, tensor in part.kept.items()}
    for name in sorted(expected.keys() | written.keys()):
        if written.get(name) != expected.get(name):
            raise RuntimeError(f"{name} is missing from {folder}, or not the model's own")
    return len(expected)
