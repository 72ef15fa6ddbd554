"""Cell by cell: run a program in a process of its own, have its folder judged, and keep what came out.

Nothing heavy is imported here: the memory of this process would count as that of those it starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Cells, data, evaluation, second_half
from benchmarks.peers.child import BrokenRunError, Usage, environment, run
from benchmarks.peers.programs import PROGRAMS, RUNNERS
from benchmarks.peers.runs import Entry, Run
from benchmarks.processor import processor
from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is the same for all: the calibration's size, the texts and windows of the evaluation, and the threads."""

    texts: tuple[str, ...]
    windows: tuple[int, ...]
    threads: int
    eval_seqlen: int
    nsamples: int = 128
    seqlen: int = 512
    seed: int = 0
    blocks: int | None = None
    """How many of the model's blocks there are; None is all."""
    short: bool = False

    @classmethod
    def full(cls, threads: int) -> Terms:
        """Return the terms of the table; raises UserError where a text is missing."""
        shared = evaluation()
        for text in shared.datasets:
            if not Path(text).is_file():
                raise UserError(f"the text {text} is missing: set MAKEWEIGHT_DATA to a folder that has it.")
        assert isinstance(shared.windows, tuple)
        return cls(texts=shared.datasets, windows=shared.windows, threads=threads, eval_seqlen=shared.seqlen)

    @classmethod
    def smoke(cls, threads: int) -> Terms:
        """Return terms under which every run ends soon and its numbers mean nothing."""
        return cls(
            texts=cls.full(threads).texts,
            windows=(2, 2),
            threads=threads,
            eval_seqlen=256,
            nsamples=4,
            seqlen=64,
            short=True,
        )


class Track:
    """A working folder with the model and the token ids in it, and the way to fill one cell."""

    def __init__(self, terms: Terms, work: Path) -> None:
        self.terms, self.work = terms, work
        work.mkdir(parents=True, exist_ok=True)
        self.tokens = work / f"tokens-{terms.nsamples}x{terms.seqlen}.safetensors"
        self.shared = {
            "text": f"{data()}/enwiki/train.txt",
            "tokens": str(self.tokens),
            "nsamples": terms.nsamples,
            "seqlen": terms.seqlen,
            "seed": terms.seed,
        }
        asked = self.shared if terms.blocks is None else {**self.shared, "blocks": terms.blocks}
        self.later = tuple(str(second_half(Path(text), work / "later")) for text in terms.texts)
        self.material = self._ask("material", work, asked)

    def cell(self, entry: Entry) -> dict[str, Any]:
        """Run and judge one entry; raises BrokenRunError where either fails, and leaves its log."""
        if entry.run is None:
            return self._judged(self.work, {"folder": self.material["model"]})
        out, job = self._folder(entry), self._job(entry, entry.run)
        load, again = os.getloadavg()[0], entry.run.program == "makeweight" and is_left(out, job)
        usage, answer = self._solve(entry.run, out, job, anew=not again)
        grid = {name: job[name] for name in ("bits", "group_size")}
        about = {"original": self.material["model"], "run": entry.name.partition("/")[2], **grid}
        judged = self._judged(out, {"folder": str(out / "dense"), **about})
        return {
            "setting": entry.setting,
            "program": entry.run.program,
            "version": answer["versions"][PROGRAMS[entry.run.program].package],
            "options": job["options"],
            "calibration": f"{self.terms.nsamples} x {self.terms.seqlen} tokens, {self.material['digest']}",
            "seed": self.terms.seed,
            "load_before": round(load, 1),
            "processor": processor(),
            **({"resumed": True} if again else {}),
            **asdict(usage),
            **answer,
            **judged,
        }

    def took(self, entry: Entry) -> dict[str, Any]:
        """Run one entry from its start, and say what that took and with what; nothing is judged or kept."""
        assert entry.run is not None
        usage, answer = self._solve(entry.run, self._folder(entry), self._job(entry, entry.run), anew=True)
        self.clear(entry)
        return {**asdict(usage), **answer}

    def clear(self, entry: Entry) -> None:
        """Delete what the run of an entry wrote."""
        shutil.rmtree(self._folder(entry), ignore_errors=True)

    def _folder(self, entry: Entry) -> Path:
        return self.work / entry.name.replace("/", "-")

    def _job(self, entry: Entry, chosen: Run) -> dict[str, Any]:
        """Return what a run is told."""
        scheme = Scheme.parse(entry.setting)
        return {
            **self.shared,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "model": self.material["model"],
            "dtype": self.material["dtype"],
            "out": str(self._folder(entry)),
            "options": chosen.shortened() if self.terms.short else dict(chosen.options),
        }

    def _solve(self, chosen: Run, out: Path, job: dict[str, Any], *, anew: bool) -> tuple[Usage, dict[str, Any]]:
        if anew:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
        program = PROGRAMS[chosen.program]
        try:
            python = program.python()
        except subprocess.CalledProcessError as error:
            raise BrokenRunError(f"no environment: {' '.join(map(str, error.cmd))} failed") from error
        (out / "job.json").write_text(json.dumps(job, indent=1))
        # Whatever is compiled is compiled in each run anew, so that none profits from the one before it.
        env = environment(self.terms.threads, TORCHINDUCTOR_CACHE_DIR=str(out / "inductor"))
        command = [str(python), str(RUNNERS / program.script), str(out / "job.json")]
        usage = run(command, cwd=out, log=self.work / f"{out.name}.log", env=env)
        return usage, json.loads((out / "answer.json").read_text())

    def _judged(self, where: Path, request: dict[str, Any]) -> dict[str, Any]:
        terms = self.terms
        texts = {"texts": terms.texts, "later": self.later}
        asked = {**texts, "eval_seqlen": terms.eval_seqlen, "windows": terms.windows}
        answer = self._ask("judge", where, {**request, **asked})
        return {**answer.pop("perplexities"), **answer}

    def _ask(self, module: str, where: Path, request: dict[str, Any]) -> dict[str, Any]:
        """Run a module of this package in a process of its own."""
        asked, told = where / f"{module}.json", where / f"{module}-answer.json"
        asked.write_text(json.dumps(request, indent=1))
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", str(asked), str(told)]
        run(command, cwd=ROOT, log=self.work / f"{module}.log", env=environment(self.terms.threads))
        return json.loads(told.read_text())


def is_left(out: Path, job: dict[str, Any]) -> bool:
    """Say whether a run of this very job was stopped before its end: one of ours goes on from there."""
    try:
        return json.loads((out / "job.json").read_text()) == json.loads(json.dumps(job))
    except (OSError, ValueError):
        return False


def race(
    results: Cells,
    chosen: Sequence[Entry],
    fill: Callable[[Entry], dict[str, Any]],
    *,
    clear: Callable[[Entry], None] = lambda entry: None,
    retry: bool = False,
) -> None:
    """Fill every cell that is not there yet; one that failed, or is of other options, waits for `retry`.

    `clear` is called once a cell that did not fail is kept.
    """
    for entry in chosen:
        known = results.cells.get(entry.name)
        stale = known is not None and entry.run is not None and known.get("options") not in (None, entry.run.options)
        if known is not None and not (retry and (stale or "error" in known)):
            if stale:
                print(f"{entry.name} is there with other options: --retry runs it again.", file=sys.stderr)
            continue
        print(f"{results.path.stem}: {entry.name}", file=sys.stderr, flush=True)
        try:
            cell = fill(entry)
        except BrokenRunError as error:
            print(error, file=sys.stderr, flush=True)
            program = {} if entry.run is None else {"setting": entry.setting, "program": entry.run.program}
            cell = {**program, "error": str(error)}
        results.keep(entry.name, cell)
        if "error" not in cell:
            clear(entry)
