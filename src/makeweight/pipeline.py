"""The whole story of a run: check, walk the blocks, write each as it is done, evaluate what was written."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from makeweight.calib.written import written_tokens
from makeweight.errors import UserError
from makeweight.export import manifest
from makeweight.export.folder import OWN, Folder
from makeweight.export.run import write_formats
from makeweight.export.solved import REPAIR, Solved
from makeweight.job import LEARNED, STATE, Job
from makeweight.numerics.memory import keep_freed_memory, peak_memory, release_freed_memory, reset_peak_memory
from makeweight.recipe import Recipe
from makeweight.report import progress
from makeweight.report.measure import measure
from makeweight.report.record import FILE, Cost, Record, machine, recipe_data, seconds_of, totals
from makeweight.sweep.finetune import Finetune
from makeweight.sweep.run import Committed, Solver, Sweep

WRITTEN = "written.scratch"
"""Where text that the model wrote is set aside."""


def quantize(recipe: Recipe) -> Record:
    """Quantize a model as the recipe says and return the record that is written beside it.

    The same recipe goes on where an earlier run of it stopped, and a finished one is not run again. Raises UserError,
    before anything is written, for whatever cannot work.
    """
    keep_freed_memory()
    reset_peak_memory()
    job = Job.prepare(recipe)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    folder = Folder.claim(recipe.out, job.claimant(), shards=job.shards)
    with folder.alone(), _threads(folder):
        return Run(job, folder).finish()


@contextmanager
def _threads(folder: Folder) -> Iterator[None]:
    """Go on with as many threads as a run began with: sums over other shares of a matrix have other last bits."""
    mine = torch.get_num_threads()
    begun = mine if folder.done else folder.threads(mine)
    if begun != mine:
        print(f"{folder.path} was begun with {begun} threads: going on with as many.", file=sys.stderr)
        torch.set_num_threads(begun)
    try:
        yield
    finally:
        torch.set_num_threads(mine)


def preflight(recipe: Recipe) -> str:
    """Check everything that `quantize` checks, and say what the run would take."""
    job = Job.prepare(recipe)
    folder = job.folder()
    if folder.done and not job.unwritten().formats and Run(job, folder).known() is not None:
        return f"{folder.path} has all that was asked for: nothing is left to do."
    return job.outlook()


@dataclass(frozen=True)
class Run:
    """A job in its folder: what is there is not done again."""

    job: Job
    folder: Folder

    def finish(self) -> Record:
        """Do what is missing, and return the record of the whole."""
        job, folder = self.job, self.folder
        if not folder.done:
            self._begin_again()
            print(job.outlook(), file=sys.stderr)
            self.solve()
            self.finetune()
            folder.note_solver(_process(job))
            files = [file for file in job.ckpt.side_files() if file.name not in OWN]
            folder.finish(job.config(), files, job.ckpt.path, {"recipe.json": job.recipe.to_json()})
        begun = folder.vouched
        if not begun:
            folder.seal()  # of weights as they were just written: what happens to them later is found
        record = self.known() if begun else None
        if record is None:
            folder.unseal()
            record = self.record()
        if not folder.sealed:
            folder.seal()
        return self.exported(record)

    def solve(self) -> None:
        """Write every shard that is missing."""
        job, folder = self.job, self.folder
        solver, store = job.solver(), job.store(folder)
        sweep, seconds = None, 0.0
        if job.tokens_NT is not None and any(folder.report(i + 1) is None for i in job.blocks):
            new_NT, seconds = self.written(job.tokens_NT)
            samples_NT = torch.cat([job.tokens_NT, new_NT])
            sweep = Sweep(job.ckpt, solver, samples_NT, job.device)
        if folder.report(0) is None:
            folder.write(0, dict(job.ckpt.rest()), {"seconds": seconds})
        with progress.bars(job.ckpt.n_blocks, job.recipe.tune.steps if sweep and job.plan.learns else 0) as bars:
            for index in range(job.ckpt.n_blocks):
                done = folder.report(index + 1) is not None
                if index not in job.blocks:
                    if not done:
                        store.keep(index)
                    if sweep and index < job.blocks.stop:
                        sweep.pass_on(index, None)
                elif done:
                    if sweep:
                        sweep.pass_on(index, store.weights(index))
                else:
                    store.commit(index, sweep.solve(index, bars.step) if sweep else self._round(solver, index))
                    folder.note_solver(_process(job))
                bars.block()

    def _begin_again(self) -> None:
        """Drop all solved blocks where a file was lost once shards hold what the whole network learned.

        A block is solved behind others as they were before that, and these are gone.
        """
        folder, shards = self.folder, [index + 1 for index in self.job.blocks]
        told = folder.finetuned is not None or folder.holds(LEARNED)
        if folder.refining and not (told and all(folder.report(shard) is not None for shard in shards)):
            lost = "lost a file while it was finished: its blocks are solved anew, in as much time as at first"
            print(f"{folder.path} {lost}.", file=sys.stderr)
            folder.forget(shards, (LEARNED, STATE))

    def written(self, tokens_NT: Tensor) -> tuple[Tensor, float]:
        """Return the samples that the model writes itself, once, as blocks see them, and the seconds of writing."""
        job, folder = self.job, self.folder
        if not (count := job.cut.calib.written):
            return tokens_NT[:0], 0.0
        if (kept := folder.scratch(WRITTEN)) is None:
            start, seed = time.perf_counter(), job.recipe.seed
            first = job.ckpt.start_token(job.ckpt.tokenizer())
            with progress.bar("writing text") as tick:
                new_NT = written_tokens(
                    job.ckpt, job.prompts(), count, device=job.device, seed=seed, start=first, tick=tick
                )
            kept = {"tokens": new_NT}
            kept["seconds"] = torch.tensor([time.perf_counter() - start])
            folder.set_aside(WRITTEN, kept)
        return kept["tokens"], kept["seconds"].item()

    def _round(self, solver: Solver, index: int) -> Committed:
        """Solve a block with nothing to learn."""
        job = self.job
        start, state = time.perf_counter(), job.ckpt.block_state(index, torch.float32)
        linears = {name: state[f"{name}.weight"] for name in job.ckpt.linears()}
        codes = solver.round(linears)
        return Committed(codes=codes, rest={}, report={"seconds": time.perf_counter() - start})

    def finetune(self) -> None:
        """Learn what the method learns of the whole network, once; a run that dies goes on from its last check.

        What was learned is written as a whole before any shard changes, and goes into each shard from there.
        """
        job, folder = self.job, self.folder
        step, store = job.plan.finetune, job.store(folder)
        if step is None or job.tokens_NT is None or job.whole_NT is None or folder.finetuned is not None:
            return
        if (learned := folder.scratch(LEARNED)) is None:
            solved, context = {index: store.mapped(index) for index in job.blocks}, job.solver().context
            release_freed_memory()
            new_NT, _ = self.written(job.tokens_NT)
            samples_NT = torch.cat([job.whole_NT, new_NT.reshape(-1, job.whole_NT.shape[1])])
            if len(samples_NT) == 1:  # none would be left to judge by: pieces of it are
                samples_NT = job.tokens_NT
            tuner = Finetune(job.ckpt, step, solved, samples_NT, context, device=job.device, seed=job.recipe.seed)
            if (state := folder.scratch(STATE)) is not None:
                tuner.restore(state)
            with progress.bar("learning the whole network") as tick:
                report = tuner.run(lambda state: folder.set_aside(STATE, state), tick)
            learned = {**tuner.freeze(), "report": torch.tensor(list(report.values()), dtype=torch.float64)}
            folder.set_aside(LEARNED, learned)
        folder.begin_refining()
        for index in job.blocks:
            store.refine(index, learned)
        folder.finish_tuning(
            dict(zip(("before", "after", "best_step", "seconds"), learned["report"].tolist(), strict=True))
        )

    def known(self) -> Record | None:
        """Return the record of a finished folder, None where it is missing, unreadable or of other texts.

        A run that was stopped between its record and the manifest has one. Raises UserError where weights have
        changed on the disk since, or another file is lost.
        """
        job, folder = self.job, self.folder
        if folder.sealed and (problems := manifest.check(folder.path, kinds=(".safetensors",))):
            raise UserError(f"{folder.path} is not what was solved: {' '.join(problems)} {REPAIR}")
        wanted, record = recipe_data(job.recipe)["eval"], self._last()
        return record if record and (not wanted["datasets"] or record.recipe["eval"] == wanted) else None

    def _last(self) -> Record | None:
        """Return the record that lies in the folder; what was measured can be measured again where there is none."""
        try:
            return replace(Record.load(self.folder.path), path=str(self.folder.path))  # it may have been moved
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def exported(self, record: Record) -> Record:
        """Write the formats that a recipe names where they are not there whole, and the record where it changes.

        What was measured or exported before and is not asked for now stays in the record.
        """
        job, folder = self.job, self.folder
        found = write_formats(Solved(folder.path), job.recipe.formats) if job.recipe.formats else ()
        known = {item["path"]: item for item in record.exports if Path(item["path"]).is_dir()}
        known |= {str(item.path): {**asdict(item), "path": str(item.path)} for item in found}
        exports = tuple(known[path] for path in sorted(known))
        same = json.dumps(exports, sort_keys=True) == json.dumps(record.exports, sort_keys=True)
        if same and (folder.path / "recipe.json").is_file():
            return record
        recipe = {**recipe_data(job.recipe), "eval": record.recipe["eval"]}
        record = replace(record, recipe=recipe, exports=exports)
        folder.unseal()
        self._write(record)
        folder.seal()
        return record

    def record(self) -> Record:
        """Evaluate the written folder and write the record."""
        job, folder = self.job, self.folder
        start, recipe, last = time.perf_counter(), job.recipe, self._last()
        perplexities, baselines = measure(recipe, str(folder.path), str(job.ckpt.path))
        reports = tuple({"block": i, **(folder.report(i + 1) or {})} for i in job.blocks)
        digest, bits_per_weight = totals(reports)
        now = _process(job)
        solver = folder.solved_by or now
        memory, gpu_memory = map(max, solver["peaks"], now["peaks"])
        record = Record(
            recipe=recipe_data(recipe),
            path=str(folder.path),
            digest=digest,
            bits_per_weight=bits_per_weight,
            file_bytes=folder.size(),
            source_bytes=job.ckpt.stored_bytes(),
            source_bits=job.ckpt.bits,
            perplexities=perplexities,
            baselines=baselines,
            blocks=reports,
            finetune=folder.finetuned or {},
            exports=last.exports if last else (),
            machine=solver["machine"],
            cost=Cost(
                solve_seconds=seconds_of(folder.report(0), *reports, folder.finetuned),
                evaluate_seconds=time.perf_counter() - start,
                peak_memory_bytes=memory,
                peak_gpu_bytes=gpu_memory,
            ),
        )
        self._write(record)
        return record

    def _write(self, record: Record) -> None:
        """Write the record, and the recipe that gives it: evaluation and formats may be others than before."""
        self.folder.write_text("recipe.json", Recipe.from_json(json.dumps(record.recipe)).to_json())
        self.folder.write_text(FILE, record.to_json())


def _process(job: Job) -> dict[str, Any]:
    """Describe what this process runs on, and the most memory it has taken so far, its own and the GPU's, in bytes."""
    gpu = torch.cuda.max_memory_allocated(job.device) if job.device.type == "cuda" else 0
    return {"machine": machine(job.device, job.dtype), "peaks": [peak_memory(), gpu]}
