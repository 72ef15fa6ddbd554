"""The whole story of a run: open, check, walk the blocks, write each as it is done, evaluate what was written."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from makeweight import __version__
from makeweight.calib.capture import find_device
from makeweight.calib.data import calibration_tokens, evaluation_texts
from makeweight.calib.written import written_tokens
from makeweight.errors import UserError
from makeweight.estimate import Estimate, estimate
from makeweight.export import compressed_tensors, manifest
from makeweight.export.base import Facts
from makeweight.export.folder import OWN, Folder
from makeweight.export.run import check as check_formats
from makeweight.export.run import export_model
from makeweight.export.solved import REPAIR
from makeweight.methods.base import Context
from makeweight.models.checkpoint import Checkpoint
from makeweight.models.load import open_checkpoint
from makeweight.numerics.memory import keep_freed_memory, peak_memory, release_freed_memory, reset_peak_memory
from makeweight.plan import Plan, check, compose
from makeweight.recipe import Recipe
from makeweight.report import progress
from makeweight.report.measure import measure
from makeweight.report.record import FILE, Cost, Record, machine, recipe_data, seconds_of, totals
from makeweight.store import Store
from makeweight.sweep.chain import Steps
from makeweight.sweep.finetune import Finetune
from makeweight.sweep.run import Committed, Solver, Sweep

STATE, LEARNED, WRITTEN = "finetune-state.scratch", "finetuned.scratch", "written.scratch"
"""How far learning of the whole network has come, what it ended as, and text that the model wrote."""


def quantize(recipe: Recipe) -> Record:
    """Quantize a model as the recipe says and return the record that is written beside it.

    The same recipe goes on where an earlier run of it stopped, and a finished one is not run again. Raises UserError,
    before anything is written, for whatever cannot work.
    """
    keep_freed_memory()
    reset_peak_memory()
    job = Job.prepare(recipe)
    folder = Folder.claim(recipe.out, identity=job.identity(), shards=job.ckpt.n_blocks + 1)
    with folder.alone():
        return job.run(folder)


def preflight(recipe: Recipe) -> str:
    """Check everything that `quantize` checks, and say what the run would take."""
    return Job.prepare(recipe).estimate.sentence()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked recipe and what it was checked against."""

    recipe: Recipe
    ckpt: Checkpoint
    plan: Plan
    blocks: range
    device: torch.device
    estimate: Estimate
    tokens_NT: torch.Tensor | None

    @classmethod
    def prepare(cls, recipe: Recipe) -> Job:
        """Open the model and the texts and refuse whatever cannot work; nothing is written."""
        plan = compose(recipe.method, options=recipe.options, rates=recipe.tune.rates)
        device = find_device(recipe.tune.device)
        ckpt = open_checkpoint(recipe.model, trust_remote_code=recipe.trust_remote_code)
        blocks = check(plan, recipe, ckpt)
        ckpt.check_sound()
        tokenizer = ckpt.tokenizer()
        wanted = recipe.eval
        texts = evaluation_texts(tokenizer, wanted.datasets, seqlen=wanted.seqlen, windows=wanted.windows)
        tokens_NT = None
        if plan.calibrates:
            calib = recipe.calib
            tokens_NT = calibration_tokens(
                tokenizer, calib.dataset, nsamples=calib.nsamples, seqlen=calib.seqlen, seed=recipe.seed
            )
        job = cls(
            recipe=recipe,
            ckpt=ckpt,
            plan=plan,
            blocks=blocks,
            device=device,
            tokens_NT=tokens_NT,
            estimate=estimate(plan, recipe, ckpt, blocks, device, windows=sum(map(len, texts))),
        )
        Folder.check(recipe.out, identity=job.identity())
        check_formats(Path(recipe.out).expanduser(), recipe.formats, job.facts(), identity=job.identity())
        return job

    def run(self, folder: Folder) -> Record:
        """Do what is missing in a folder, and return the record of the whole."""
        if not folder.done:
            print(self.estimate.sentence(), file=sys.stderr)
            self.solve(folder)
            self.finetune(folder)
            files = [file for file in self.ckpt.side_files() if file.name not in OWN]
            folder.finish(self.config(), files, self.ckpt.path, {"recipe.json": self.recipe.to_json()})
        record = self.known(folder)
        if record is None:
            folder.unseal()
            record = self.record(folder)
            folder.seal()
        return self.exported(folder, record)

    def facts(self) -> Facts:
        """Return what formats ask, as far as it is known before anything is solved."""
        return Facts.of(
            json.loads((self.ckpt.path / "config.json").read_text(encoding="utf-8")),
            scheme=self.recipe.scheme,
            folder=self.ckpt.path,
            fp16_scales=self.recipe.scheme.scale_dtype != "float32",
            shapes={
                self.ckpt.block_names(i)[f"{name}.weight"].removesuffix(".weight"): shape
                for i in self.blocks
                for name, shape in self.ckpt.linear_shapes(i).items()
            },
        )

    def identity(self) -> str:
        """Return a hash of all that decides the bytes of the weights."""
        data = recipe_data(self.recipe)
        for name in ("model", "out", "eval", "formats", "trust_remote_code"):
            del data[name]
        # The plan holds every setting that the recipe leaves to its default: a release may change one.
        text = json.dumps([data, repr(self.plan), self.ckpt.fingerprint(), __version__], sort_keys=True)
        tokens = b"" if self.tokens_NT is None else self.tokens_NT.numpy().tobytes()
        return hashlib.sha256(text.encode() + tokens).hexdigest()

    def solver(self) -> Solver:
        """Return what solves one block."""
        recipe, stored = self.recipe, self.ckpt.dtype
        named = recipe.scheme.scale_dtype
        automatic = torch.float16 if stored == torch.float32 else stored
        return Solver(
            steps=Steps(exact=self.plan.exact, maps=self.plan.maps, grid=self.plan.grid),
            rounding=self.plan.rounding,
            judge_weights=self.plan.loss.weights(),
            same_input=self.plan.target.weight if self.plan.target else 0.0,
            tune=recipe.tune,
            seed=recipe.seed,
            context=Context(
                scheme=recipe.scheme,
                steps=recipe.tune.steps,
                dtype=getattr(torch, recipe.tune.dtype),
                spec=self.ckpt.spec,
                config=self.ckpt.config,
                scale_dtype=automatic if named == "auto" else getattr(torch, named),
            ),
        )

    def store(self, folder: Folder) -> Store:
        """Return the blocks that a folder holds of this run."""
        dtype = getattr(torch, self.recipe.tune.dtype)
        return Store(ckpt=self.ckpt, folder=folder, scheme=self.recipe.scheme, dtype=dtype)

    def solve(self, folder: Folder) -> None:
        """Write every shard that is missing."""
        solver, store = self.solver(), self.store(folder)
        sweep, seconds = None, 0.0
        if self.tokens_NT is not None and any(folder.report(i + 1) is None for i in self.blocks):
            samples_NT, seconds = self.samples(folder, self.tokens_NT)
            sweep = Sweep(self.ckpt, solver, samples_NT, self.device)
        if folder.report(0) is None:
            folder.write(0, dict(self.ckpt.rest()), {"seconds": seconds})
        with progress.bars(self.ckpt.n_blocks, self.recipe.tune.steps if sweep and self.plan.learns else 0) as bars:
            for index in range(self.ckpt.n_blocks):
                done = folder.report(index + 1) is not None
                if index not in self.blocks:
                    if not done:
                        store.keep(index)
                    if sweep and index < self.blocks.stop:
                        sweep.pass_on(index, None)
                elif done:
                    if sweep:
                        sweep.pass_on(index, store.weights(index))
                else:
                    store.commit(index, sweep.solve(index, bars.step) if sweep else self._round(solver, index))
                bars.block()

    def samples(self, folder: Folder, tokens_NT: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the calibration samples with those that the model writes itself, once, and the seconds of writing."""
        if not (count := self.recipe.calib.written):
            return tokens_NT, 0.0
        if (kept := folder.scratch(WRITTEN)) is None:
            start, seed = time.perf_counter(), self.recipe.seed
            with progress.bar("writing text") as tick:
                kept = {"tokens": written_tokens(self.ckpt, tokens_NT, count, device=self.device, seed=seed, tick=tick)}
            kept["seconds"] = torch.tensor([time.perf_counter() - start])
            folder.set_aside(WRITTEN, kept)
        return torch.cat([tokens_NT, kept["tokens"]]), kept["seconds"].item()

    def _round(self, solver: Solver, index: int) -> Committed:
        """Solve a block with nothing to learn."""
        start, state = time.perf_counter(), self.ckpt.block_state(index, torch.float32)
        linears = {name: state[f"{name}.weight"] for name in self.ckpt.linears()}
        codes = solver.round(linears)
        return Committed(codes=codes, rest={}, report={"seconds": time.perf_counter() - start})

    def finetune(self, folder: Folder) -> None:
        """Learn what the method learns of the whole network, once; where a run dies, a few steps are lost.

        What was learned is written as a whole before any shard changes, and goes into each shard from there.
        """
        step, start, store = self.plan.finetune, time.perf_counter(), self.store(folder)
        if step is None or self.tokens_NT is None or folder.finetuned is not None:
            return
        if (learned := folder.scratch(LEARNED)) is None:
            solved, context = {index: store.mapped(index) for index in self.blocks}, self.solver().context
            release_freed_memory()
            samples_NT, _ = self.samples(folder, self.tokens_NT)
            tuner = Finetune(self.ckpt, step, solved, samples_NT, context, device=self.device, seed=self.recipe.seed)
            if (state := folder.scratch(STATE)) is not None:
                tuner.restore(state)
            with progress.bar("learning the whole network") as tick:
                report = tuner.run(lambda state: folder.set_aside(STATE, state), tick)
            learned = {**tuner.freeze(), "report": torch.tensor(list(report.values()), dtype=torch.float64)}
            folder.set_aside(LEARNED, learned)
        for index in self.blocks:
            store.refine(index, learned)
        report = dict(zip(("before", "after", "best_step"), learned["report"].tolist(), strict=True))
        folder.finish_tuning({**report, "seconds": time.perf_counter() - start})

    def config(self) -> dict[str, Any]:
        """Return config.json: the model's own, with the quantization described."""
        config = json.loads((self.ckpt.path / "config.json").read_text(encoding="utf-8"))
        solved = {f"{self.ckpt.block_module_path(i)}.{name}" for i in self.blocks for name in self.ckpt.linears()}
        ignore = [name for name in self.ckpt.all_linears() if name not in solved]
        config["quantization_config"] = compressed_tensors.quantization_config(self.recipe.scheme, ignore)
        return config

    def known(self, folder: Folder) -> Record | None:
        """Return the record of a finished folder, None where it is missing or of other texts.

        Raises UserError where weights have changed on the disk since.
        """
        if not folder.sealed:
            return None
        if problems := manifest.check(folder.path, kinds=(".safetensors",)):
            raise UserError(f"{folder.path} is not what was solved: {' '.join(problems)} {REPAIR}")
        record = Record.load(folder.path)
        return record if record.recipe["eval"] == recipe_data(self.recipe)["eval"] else None

    def exported(self, folder: Folder, record: Record) -> Record:
        """Write the formats that a recipe names, and the record again where they are new."""
        same = [item["format"] for item in record.exports] == list(dict.fromkeys(self.recipe.formats))
        if same and all(Path(item["path"]).is_dir() for item in record.exports):
            return record
        found = export_model(folder.path, self.recipe.formats)
        exports = tuple({**asdict(item), "path": str(item.path)} for item in found)
        record = replace(record, recipe=recipe_data(self.recipe), exports=exports)
        folder.unseal()
        folder.write_text(FILE, record.to_json())
        folder.seal()
        return record

    def record(self, folder: Folder) -> Record:
        """Evaluate the written folder and write the record."""
        start, recipe = time.perf_counter(), self.recipe
        perplexities = measure(recipe, str(folder.path), "evaluating the result")
        baselines = measure(recipe, str(self.ckpt.path), "evaluating the original") if recipe.eval.baseline else ()
        reports = tuple({"block": i, **(folder.report(i + 1) or {})} for i in self.blocks)
        digest, bits_per_weight = totals(reports)
        record = Record(
            recipe=recipe_data(recipe),
            path=str(folder.path),
            digest=digest,
            bits_per_weight=bits_per_weight,
            file_bytes=folder.size(),
            source_bytes=self.ckpt.stored_bytes(),
            perplexities=perplexities,
            baselines=baselines,
            blocks=reports,
            finetune=folder.finetuned or {},
            machine=machine(self.device),
            cost=Cost(
                solve_seconds=seconds_of(folder.report(0), *reports, folder.finetuned),
                evaluate_seconds=time.perf_counter() - start,
                peak_memory_bytes=peak_memory(),
                peak_gpu_bytes=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
            ),
        )
        folder.write_text(FILE, record.to_json())
        return record
