"""The race as Markdown: one table for each setting, then what has to be known to read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import table
from benchmarks.peers.runs import ORIGINAL, RUNS, SETTINGS

DOMAINS = {"wikitext2": "WikiText-2", "enwiki": "enwiki"}
COSTS = ("minutes", "CPU minutes", "peak GB")
COSTS_NOTE = (
    "Time and memory are those of a whole process, from its start to the written weights; ours tokenizes the text "
    "itself and writes its own format before the dense one."
)
GAP_NOTE = "g is the logarithm of a perplexity over the original's: 0 where nothing is lost, and less is better."
LATER_NOTE = (
    "g later is on as many windows from the second half of each text, which had no part in choosing methods or steps; "
    "a dash stands in rows from before there was such a column."
)
DIVERGENCE_NOTE = (
    "KL is the divergence from the original's predictions, nats for each token, on the same two texts; a dash stands "
    "in rows from before it was measured."
)
EMPTY = ("-",) * (2 * len(DOMAINS) + 2 + len(COSTS))


def markdown(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all tables; g is the logarithm of a perplexity over the original's, 0 where nothing is lost."""
    original = cells.get(ORIGINAL, {})
    found = {cell["setting"] for cell in cells.values() if "setting" in cell}
    settings = [*(name for name in SETTINGS if name in found), *sorted(found - {*SETTINGS})]
    order = [*RUNS, *sorted({name.partition("/")[2] for name in cells} - {*RUNS, ""})]
    parts = []
    for setting in settings:
        names = [name for name in order if f"{setting}/{name}" in cells]
        gaps = (*(f"g {name}" for name in DOMAINS.values()), "g later")
        header = (setting, "by", *DOMAINS.values(), *gaps, "KL", *COSTS)
        first = ["original", "", *(_number(original.get(name)) for name in DOMAINS), *EMPTY[len(DOMAINS) :]]
        untimed = _untimed(setting, cells)
        rows = [_row(name, cells[f"{setting}/{name}"], original, timed=name not in untimed) for name in names]
        parts.append(table(header, [first, *rows]))
    return "\n\n".join([*parts, _notes(cells, order)])


def _row(name: str, cell: Mapping[str, Any], original: Mapping[str, Any], *, timed: bool) -> list[str]:
    if "error" in cell:
        return [f"`{name}`", f"{cell['program']} (failed)", *EMPTY]
    return [
        f"`{name}`",
        f"{cell['program']} {cell['version']}",
        *(_number(cell[domain]) for domain in DOMAINS),
        *(_gap(cell[domain], original.get(domain)) for domain in DOMAINS),
        _later(cell, original),
        _divergence(cell.get("divergence")),
        *(f"{cell[clock] / 60:.1f}" if timed else "-" for clock in ("wall_seconds", "cpu_seconds")),
        "-" if cell.get("resumed") else f"{cell['peak_memory_mb'] / 1000:.1f}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gap(value: float, original: float | None) -> str:
    return "-" if original is None else f"{math.log(value / original):.3f}"


def _later(cell: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    if "later" not in cell or "later" not in original:
        return "-"
    ours, theirs = (found["later"]["perplexities"] for found in (cell, original))
    return " / ".join(_gap(ours[domain], theirs[domain]) for domain in DOMAINS)


def _divergence(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else " / ".join(f"{found[domain]:.3f}" for domain in DOMAINS)


def _notes(cells: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """Say on what terms the cells were made, what is special about a run, and what is missing."""
    raced = [cell for name, cell in cells.items() if name != ORIGINAL and "error" not in cell]
    threads = sorted({cell["threads"] for cell in raced})
    samples = sorted({cell["calibration"].partition(",")[0] for cell in raced})
    lines = [f"- Calibration: {', '.join(samples) or '-'}; threads: {', '.join(map(str, threads)) or '-'}."]
    lines += [f"- {note}" for note in (GAP_NOTE, LATER_NOTE, DIVERGENCE_NOTE, COSTS_NOTE)]
    for setting in dict.fromkeys(cell["setting"] for cell in raced):
        if processor := _processor(setting, cells):
            lines.append(f"- Minutes at {setting} are of {processor}.")
        if runs := _untimed(setting, cells):
            lines.append(
                f"- Minutes of {', '.join(f'`{run}`' for run in runs)} at {setting} left out: of another or an unknown "
                "processor, or of a run that was stopped in between."
            )
    lines += _changed(cells)
    lines += _remarks(cells, order)
    lines += [f"- Not run yet at {setting}: {', '.join(names)}." for setting, names in _missing(cells).items()]
    return "\n".join(lines)


def _missing(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the runs that are to come in the settings of the race, by setting."""
    found = {
        setting: [
            f"`{name}`" for name, run in RUNS.items() if setting in run.settings and f"{setting}/{name}" not in cells
        ]
        for setting in SETTINGS
    }
    return {setting: names for setting, names in found.items() if names}


def _changed(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which runs changed more of the blocks than their linears, as far as it is known."""
    runs: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if names := cell.get("grid", {}).get("also_changed"):
            found, run = runs.setdefault(", ".join(f"`{name}`" for name in names), []), f"`{name.partition('/')[2]}`"
            found += [] if run in found else [run]
    lines = [f"- Besides linears, {', '.join(found)} changed {names}." for names, found in runs.items()]
    raced = {name: cell for name, cell in cells.items() if "setting" in cell and "error" not in cell}
    silent = {name.partition("/")[2] for name, cell in raced.items() if "also_changed" not in cell.get("grid", {})}
    if silent:
        named = ", ".join(f"`{run}`" for run in sorted(silent))
        lines.append(f"- Of {named} it is not recorded in every setting whether more than linears changed.")
    return lines


def _remarks(cells: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """Say what is special about each run, and in which settings where that is not the same in all."""
    noted: dict[str, dict[str, list[str]]] = {}
    for name, cell in cells.items():
        if note := cell.get("note"):
            setting, _, run = name.partition("/")
            noted.setdefault(run, {}).setdefault(note, []).append(setting)
    lines = []
    for run, notes in sorted(noted.items(), key=lambda pair: order.index(pair[0])):
        for note, settings in notes.items():
            where = f" at {', '.join(settings)}" if len(notes) > 1 else ""
            lines.append(f"- `{run}`{where}: {note}.")
    return lines


def _processor(setting: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the processor, and its threads, by which most runs of a setting were made, empty where known of none."""
    named = Counter(_machine(cell) for cell in cells.values() if cell.get("setting") == setting and "processor" in cell)
    return named.most_common(1)[0][0] if named else ""


def _machine(cell: Mapping[str, Any]) -> str:
    return f"{cell['processor']}, {cell['threads']} threads" if "processor" in cell else ""


def _untimed(setting: str, cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the runs whose times are no match for the others': of another or an unknown processor, or resumed."""
    most = _processor(setting, cells)
    return [
        name.partition("/")[2]
        for name, cell in cells.items()
        if cell.get("setting") == setting
        and "error" not in cell
        and (cell.get("resumed") or not most or _machine(cell) != most)
    ]
