"""From one solved folder to others: refuse first, write, read back, compare, and only then give it its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from makeweight.errors import UserError, did_you_mean
from makeweight.export import manifest
from makeweight.export.base import Format, deviation
from makeweight.export.formats import FORMATS
from makeweight.export.manifest import tensor_hash
from makeweight.export.solved import Solved


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


def can_export(solved: Solved) -> list[Answer]:
    """Ask every format about a solved folder; nothing is written."""
    return [
        Answer(
            format=name, refusal=form.refusal(solved.facts) or "", exact=form.tolerance == 0, loads=tuple(form.loads)
        )
        for name, form in FORMATS.items()
    ]


def export(
    path: str | Path,
    formats: Sequence[str],
    *,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Exported]:
    """Write a solved folder in other formats, each into `out`/<format> (None: beside it, as <folder>-<format>).

    Nothing is solved again. Raises UserError, before anything is written, for a format that is unknown or cannot hold
    the model, and for a folder that is already there; RuntimeError where what was written reads back differently.
    """
    chosen = [_known(name) for name in dict.fromkeys(formats)]
    solved = Solved(path)
    base = solved.path.resolve()
    targets = [
        Path(out).expanduser() / form.name if out else base.with_name(f"{base.name}-{form.name}") for form in chosen
    ]
    for form, target in zip(chosen, targets, strict=True):
        if reason := form.refusal(solved.facts):
            raise UserError(f"{form.name} cannot hold {solved.path}: {reason}.")
        if target.exists():
            raise UserError(f"{target} already exists: give another --out, or delete it.")
    done = []
    for form, target in zip(chosen, targets, strict=True):
        if progress is not None:
            progress(form.name)
        done.append(_export(form, solved, target))
    return done


def _known(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format {name!r} is unknown{did_you_mean(name, FORMATS)}: choose among {', '.join(FORMATS)}.")
    return FORMATS[name]


def _export(form: Format, solved: Solved, target: Path) -> Exported:
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
    part.mkdir(parents=True)
    form.write(solved, part)
    shutil.copyfile(solved.path / "recipe.json", part / "recipe.json")
    worst = _compare(form, solved, part)
    kept = _compare_kept(form, solved, part)
    (part / manifest.NAME).write_text(manifest.build(part), encoding="utf-8")
    part.replace(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Exported(format=form.name, path=target, linears=len(solved.names), kept=kept, bytes=size, deviation=worst)


def _compare(form: Format, solved: Solved, folder: Path) -> float:
    """Return the largest deviation of a linear that is read back, or raise RuntimeError where one is too large."""
    written = form.read(solved, folder)
    worst, seen = 0.0, set()
    for part in solved.parts():
        for name, tensor in part.quantized.items():
            got, weight_OI = next(written)
            off = deviation(weight_OI, tensor) if got == name else float("inf")
            if not off <= form.tolerance:
                raise RuntimeError(f"{name} reads back differently from {folder}: {off:.3g} steps off")
            worst = max(worst, off)
            seen.add(name)
    if seen != set(solved.names) or next(written, None) is not None:
        raise RuntimeError(f"{folder} does not hold the linears that were solved")
    return worst


def _compare_kept(form: Format, solved: Solved, folder: Path) -> int:
    """Return how many other tensors were written, or raise RuntimeError where one is missing or has another value."""
    written = {name: tensor_hash(tensor.float()) for name, tensor in form.read_kept(solved, folder)}
    expected = {name: tensor_hash(tensor.float()) for part in solved.parts() for name, tensor in part.kept.items()}
    for name in sorted(expected.keys() | written.keys()):
        if written.get(name) != expected.get(name):
            raise RuntimeError(f"{name} is missing from {folder}, or not the model's own")
    return len(expected)
