"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from makeweight.evals.perplexity import Perplexity
from makeweight.report.record import Record


def show(record: Record, console: Console | None = None) -> None:
    """Print what one run gave, and in plain words what the model lost."""
    console = console or _console()
    compare([record], console)
    console.print(f"Written to {record.path}", markup=False)
    for item in record.exports:
        console.print(f"{item['format']} written to {item['path']}", markup=False)


def compare(records: Sequence[Record], console: Console | None = None) -> None:
    """Print runs of one model side by side, the original first where a run measured it."""
    console = console or _console()
    baselines = next((record.baselines for record in records if record.baselines), ())
    names = [result.dataset for result in (baselines or records[0].perplexities)]
    compared = names if any(item.divergence is not None for one in records for item in one.perplexities) else []
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("perplexity" if names else "", no_wrap=True)
    further = ("bits/weight", "file MB", "seconds", "peak MB")
    for column in (*map(_short, names), *(f"KL {_short(name)}" for name in compared), *further):
        table.add_column(escape(column), justify="right", overflow="fold")
    if baselines:
        size = f"{records[0].source_bytes / 1e6:.1f}"
        none = ["0" for _ in compared]
        table.add_row("original", *_cells(baselines, names), *none, str(records[0].source_bits), size, "", "")
    for record in records:
        table.add_row(
            escape(record.method),
            *_cells(record.perplexities, names),
            *_divergences(record.perplexities, compared),
            f"{record.bits_per_weight:.2f}",
            f"{record.file_bytes / 1e6:.1f}",
            f"{record.cost.solve_seconds:.0f}",
            f"{max(record.cost.peak_memory_bytes, record.cost.peak_gpu_bytes) / 1e6:.0f}",
        )
    console.print(table)
    if verdict := records[-1].verdict():
        console.print(verdict, markup=False)


def evaluated(
    results: Sequence[Perplexity], originals: Sequence[Perplexity] = ()
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the rows of an evaluation, against an original's where there is one."""
    first = [(_short(ours.dataset), f"{ours.perplexity:.3f}") for ours in results]
    if not originals:
        rows = [(str(ours.windows), str(ours.tokens), f"{ours.seconds:.1f}") for ours in results]
        header = ("windows", "tokens", "seconds")
    else:
        rows = [
            (f"{theirs.perplexity:.3f}", f"{ours.divergence:.4f}", f"{100 * (ours.same_top or 0):.1f} %",
             str(ours.tokens))
            for ours, theirs in zip(results, originals, strict=True)
        ]  # fmt: skip
        header = ("original", "KL", "same top", "tokens")
    return ("dataset", "perplexity", *header), [(*a, *b) for a, b in zip(first, rows, strict=True)]


def is_table(value: object) -> bool:
    """Whether a value of a description is a list of rows, each a dictionary."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def words(value: object) -> str:
    """Write a value of a description for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _console() -> Console:
    """Write as wide as a terminal is, and without folding into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _cells(results: Sequence[Perplexity], names: Sequence[str]) -> list[str]:
    found = {result.dataset: f"{result.perplexity:.2f}" for result in results}
    return [found.get(name, "-") for name in names]


def _divergences(results: Sequence[Perplexity], names: Sequence[str]) -> list[str]:
    found = {result.dataset: f"{result.divergence:.3f}" for result in results if result.divergence is not None}
    return [found.get(name, "-") for name in names]


def _short(name: str) -> str:
    """Shorten a path to what tells it apart: its folder and its name."""
    path = Path(name)
    return f"{path.parent.name}/{path.stem}" if path.parent.name else name
