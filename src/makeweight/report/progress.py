"""Progress bars for blocks and steps, on standard error, silent where that is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """Two bars: blocks of the model, and steps within a block."""

    def __init__(self, progress: Progress, blocks: int, steps: int) -> None:
        self._progress = progress
        self._blocks = progress.add_task("blocks", total=blocks)
        self._steps = progress.add_task("steps", total=steps, visible=steps > 0)
        self._total = steps

    def step(self) -> None:
        """Count one optimiser step."""
        self._progress.advance(self._steps)

    def block(self) -> None:
        """Count one finished block and start the steps of the next."""
        self._progress.advance(self._blocks)
        self._progress.reset(self._steps, total=self._total)


@contextmanager
def bars(blocks: int, steps: int) -> Iterator[Bars]:
    """Show the bars while the body runs."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress, blocks, steps)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar; the body gets what drives it, a callable of (done, total)."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
