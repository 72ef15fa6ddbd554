"""A run before it runs: the recipe with the model and the texts it names, checked, and what follows from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from makeweight import __version__
from makeweight.calib.capture import check_replay, find_device
from makeweight.calib.data import behind, calibration_tokens, check_tokens, evaluation_texts
from makeweight.estimate.run import Estimate, estimate, room
from makeweight.export import compressed_tensors
from makeweight.export.base import Facts
from makeweight.export.claim import Claimant, check_place, deciding
from makeweight.export.claim import check as check_owner
from makeweight.export.folder import Folder
from makeweight.export.run import check as check_formats
from makeweight.export.run import known, target_of
from makeweight.methods.base import Context
from makeweight.models.checkpoint import Checkpoint
from makeweight.models.load import open_checkpoint
from makeweight.numerics.flops import crowded
from makeweight.numerics.grid import scale_dtype_of
from makeweight.numerics.memory import machine_memory
from makeweight.numerics.precision import fast_dtype, name_of, named_dtype
from makeweight.paths import expanded
from makeweight.plan import Plan, check, compose, in_pieces
from makeweight.recipe import Recipe
from makeweight.store import Store
from makeweight.sweep import heldout
from makeweight.sweep.chain import Steps
from makeweight.sweep.finetune import steps_taken
from makeweight.sweep.run import Solver

STATE, LEARNED = "finetune-state.scratch", "finetuned.scratch"
"""Where it is set aside how far learning of the whole network has come, and what it ended as."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked recipe and what it was checked against."""

    recipe: Recipe
    cut: Recipe
    """The recipe as blocks see it: where they learn, its samples are pieces of those drawn."""
    ckpt: Checkpoint
    plan: Plan
    blocks: range
    device: torch.device
    windows: int
    """How many windows of text are evaluated."""
    tokens_NT: Tensor | None
    """The calibration samples as blocks see them; None where nothing needs any."""
    whole_NT: Tensor | None
    """The calibration samples as the whole network sees them: not in pieces."""

    @classmethod
    def prepare(cls, recipe: Recipe) -> Job:
        """Open the model and the texts and refuse whatever cannot work; nothing is written."""
        plan = compose(recipe.method, options=recipe.options, rates=recipe.tune.rates)
        device = find_device(recipe.tune.device)
        ckpt = open_checkpoint(recipe.model, trust_remote_code=recipe.trust_remote_code)
        blocks = check(plan, recipe, ckpt)
        check_place(recipe.out)
        ckpt.check_sound()
        tokenizer = ckpt.tokenizer()
        wanted = recipe.eval
        texts = evaluation_texts(tokenizer, wanted.datasets, seqlen=wanted.seqlen, windows=wanted.windows)
        cut = in_pieces(plan, recipe)
        tokens_NT = whole_NT = None
        if plan.calibrates:
            calib, length = recipe.calib, cut.calib.seqlen
            used, start = cut.calib.nsamples // calib.nsamples * length, ckpt.start_token(tokenizer)
            drawn_NT = calibration_tokens(
                tokenizer, calib.dataset, nsamples=calib.nsamples, seqlen=calib.seqlen, seed=recipe.seed
            )[:, :used]
            tokens_NT, whole_NT = behind(start, drawn_NT.reshape(-1, length)), behind(start, drawn_NT)
        check_tokens(ckpt, *texts, *([] if whole_NT is None else [whole_NT]))
        check_replay(ckpt.skeleton(), ckpt.spec.blocks)
        job = cls(
            recipe=recipe,
            cut=cut,
            ckpt=ckpt,
            plan=plan,
            blocks=blocks,
            device=device,
            windows=sum(map(len, texts)),
            tokens_NT=tokens_NT,
            whole_NT=whole_NT,
        )
        run = job.claimant()
        check_owner(recipe.out, run)
        check_formats(expanded(recipe.out), recipe.formats, job.facts(), identity=run.identity)
        room(plan, job.unwritten(), ckpt, blocks, solved=job.folder().done, widths=job.widths())
        return job

    @property
    def shards(self) -> int:
        """How many files of weights the result has: one of what is outside the blocks, and one for each block."""
        return self.ckpt.n_blocks + 1

    def folder(self) -> Folder:
        """Return where the result goes, as it is by now."""
        return Folder(expanded(self.recipe.out), self.shards)

    def unwritten(self) -> Recipe:
        """Return the recipe with those of its formats alone that are not there."""
        out = self.folder().path
        missing = tuple(name for name in self.recipe.formats if not target_of(out, name, None).is_dir())
        return replace(self.recipe, formats=missing)

    def estimate(self) -> Estimate:
        """Return what the rest of the run will take; what its folder holds by now is done.

        Raises UserError where the disk cannot hold the result.
        """
        folder = self.folder()
        return estimate(
            self.plan,
            self.unwritten(),
            self.ckpt,
            self.blocks,
            self.device,
            windows=self.windows,
            solved=folder.done,
            left=[index for index in self.blocks if folder.report(index + 1) is None],
            tuned=_tuned(self.plan, folder),
            widths=self.widths(),
        )

    @property
    def pieces(self) -> int:
        """How many pieces blocks see of a sample."""
        return self.cut.calib.nsamples // self.recipe.calib.nsamples

    def prompts(self) -> Tensor:
        """Return the calibration samples, as blocks see them, that the model may go on from: none that judges."""
        assert self.tokens_NT is not None
        _, learned = heldout.split(self.recipe.calib.samples, self.recipe.seed, pieces=self.pieces)
        learned_NT = self.tokens_NT[learned[learned < len(self.tokens_NT)]]
        return learned_NT if len(learned_NT) else self.tokens_NT  # the only one given may be the one that judges

    def outlook(self) -> str:
        """Say what weights become and what that takes, and where it is more than this machine has."""
        expected = self.estimate()
        said = f"Weights of {self.recipe.scheme.words()}. {expected.sentence()}"
        if self.device.type == "cpu" and crowded():
            said += " Other programs are at work here: alone it takes less time."
        if fast_dtype(self.dtype, self.device) != self.dtype:
            said += f" This device only emulates {self.recipe.tune.dtype}: tune.dtype=auto is many times faster."
        return said + self._too_little_memory(expected)

    def _too_little_memory(self, expected: Estimate) -> str:
        """Say where a run takes more than this machine has, or learning more than its GPU."""
        if self.device.type == "cpu":
            there, wanted = machine_memory(), expected.memory_bytes
            words, less = "This machine has only", "fewer or shorter samples (--nsamples, --seqlen)"
        elif self.device.type == "cuda":
            there, wanted = torch.cuda.get_device_properties(self.device).total_memory, expected.gpu_bytes
            words, less = "Its GPU has only", "shorter samples (--seqlen) or a smaller --batch-size"
            if self.plan.finetune is not None:
                less = "shorter samples (--seqlen), or a method without e2e,"
        else:
            return ""
        if there is None or wanted <= there:
            return ""
        return f" {words} {there / 1e9:.1f} GB of memory: {less} take less."

    def facts(self) -> Facts:
        """Return what formats ask, as far as it is known before anything is solved."""
        return Facts.of(
            json.loads((self.ckpt.path / "config.json").read_text(encoding="utf-8")),
            scheme=self.recipe.scheme,
            folder=self.ckpt.path,
            kept=tuple(name for name, _ in self.ckpt.rest()) if self.recipe.formats else (),
            fp16_scales=self.recipe.scheme.scale_dtype != "float32",
            shapes={
                self.ckpt.block_names(i)[f"{name}.weight"].removesuffix(".weight"): shape
                for i in self.blocks
                for name, shape in self.ckpt.linear_shapes(i).items()
            },
        )

    def widths(self) -> dict[str, float]:
        """Return the bits that a weight takes in those of the recipe's formats that have widths of their own."""
        facts = self.facts()
        found = {name: known(name).weight_bits(facts) for name in self.recipe.formats}
        return {name: bits for name, bits in found.items() if bits is not None}

    def claimant(self) -> Claimant:
        """Return the run as its folder knows it."""
        solved_in = self.dtype if self.plan.calibrates else torch.float32
        return Claimant(identity=self.identity(), recipe=self.recipe, device=self.device.type, dtype=name_of(solved_in))

    def identity(self) -> str:
        """Return a hash of all that decides the bytes of the weights."""
        plan = self.plan
        if plan.finetune is not None:
            plan = replace(plan, finetune=replace(plan.finetune, recompute=True))
        # The plan holds every setting that the recipe leaves to its default: a release may change one.
        text = json.dumps([deciding(self.recipe), repr(plan), self.ckpt.fingerprint(), __version__], sort_keys=True)
        tokens = b"" if self.tokens_NT is None else self.tokens_NT.numpy().tobytes()
        return hashlib.sha256(text.encode() + tokens).hexdigest()

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales."""
        return scale_dtype_of(self.recipe.scheme, self.ckpt.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of forward passes while the model is learned on."""
        return named_dtype(self.recipe.tune.dtype, self.device)

    def solver(self) -> Solver:
        """Return what solves one block."""
        recipe, tune = self.recipe, self.cut.tune
        return Solver(
            steps=Steps(exact=self.plan.exact, maps=self.plan.maps, grid=self.plan.grid),
            rounding=self.plan.rounding,
            judge_weights=self.plan.loss.weights(),
            same_input=self.plan.target.weight if self.plan.target else 0.0,
            pieces=self.pieces,
            tune=tune,
            seed=recipe.seed,
            context=Context(
                scheme=recipe.scheme,
                steps=tune.steps,
                dtype=self.dtype,
                spec=self.ckpt.spec,
                config=self.ckpt.config,
                scale_dtype=self.scale_dtype,
            ),
        )

    def store(self, folder: Folder) -> Store:
        """Return the blocks that a folder holds of this run."""
        scheme, scale_dtype = self.recipe.scheme, self.scale_dtype
        return Store(ckpt=self.ckpt, folder=folder, scheme=scheme, dtype=self.dtype, scale_dtype=scale_dtype)

    def config(self) -> dict[str, Any]:
        """Return config.json: the model's own, with the quantization described."""
        config = json.loads((self.ckpt.path / "config.json").read_text(encoding="utf-8"))
        if not self.recipe.trust_remote_code:
            config.pop("auto_map", None)  # it names code that is not copied
        solved = {f"{self.ckpt.block_module_path(i)}.{name}" for i in self.blocks for name in self.ckpt.linears()}
        ignore = [name for name in self.ckpt.all_linears() if name not in solved]
        config["quantization_config"] = compressed_tensors.quantization_config(self.recipe.scheme, ignore)
        return config


def _tuned(plan: Plan, folder: Folder) -> float:
    """Return the share of the steps of the whole network that an earlier run has taken."""
    if folder.finetuned is not None or folder.holds(LEARNED):
        return 1.0
    if plan.finetune is None or (state := folder.scratch(STATE)) is None:
        return 0.0
    return steps_taken(state) / plan.finetune.steps
