"""A process run to its end, and what it took."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAST_LINES = 15


class BrokenRunError(RuntimeError):
    """A run that ended badly; the text is its last words."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process took: seconds on the clock, seconds of all its cores, and its largest resident memory.

    Processes that it started count: their time is added, and memory is that of the largest one.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_memory_mb: int


def environment(threads: int, **more: str) -> dict[str, str]:
    """Return the environment that all runs have: so many threads, no accelerator, no network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **counts, **fixed, **more}


def run(command: Sequence[str], *, cwd: Path, log: Path, env: Mapping[str, str]) -> Usage:
    """Run a command whose output goes to `log`; raises BrokenRunError with its last lines where it fails.

    The system counts the memory of the process that starts another as if it were the other's for a moment: whoever
    calls this should be small.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = last_lines(log.read_bytes().decode(errors="replace"))
        raise BrokenRunError(f"exit code {process.returncode}\n{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(
        wall_seconds=round(seconds, 1),
        cpu_seconds=round(used.ru_utime + used.ru_stime, 1),
        peak_memory_mb=round(used.ru_maxrss * unit / 1e6),
    )


def last_lines(text: str) -> str:
    """Return the last lines that say something, without what progress bars overwrote."""
    lines = [line.rpartition("\r")[2].rstrip() for line in re.split(r"\r?\n", text)]
    return "\n".join([line[:300] for line in lines if line][-LAST_LINES:])
