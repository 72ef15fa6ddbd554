"""Learning of the whole network: the loss is that of the written model, it falls, and a run that dies goes on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from makeweight.calib.data import calibration_tokens
from makeweight.errors import UserError
from makeweight.export.folder import Folder
from makeweight.job import Job
from makeweight.methods.base import Context
from makeweight.methods.finetune.e2e import LEAST, E2e, Scales
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Calib, Eval, Recipe, Tune
from makeweight.sweep import finetune
from makeweight.sweep.finetune import Finetune
from tests.runs import our_logits, small, tensors
from tests.tiny import VOCABULARY, tiny_folder

NOT_MEASURED = Eval(datasets=(), seqlen=64)
pytestmark = pytest.mark.usefixtures("known_rate")
AS_WRITTEN = Tune(steps=4, device="cpu", dtype="bfloat16")
"""In the dtype of the written weights: float32 products of codes and scales are others in their last bits."""
STEPS = {"e2e": {"steps": 12, "batch_size": 2, "rate": 2e-2}}
ROUNDING = {"e2e": {**STEPS["e2e"], "rounding": True, "steps": 60, "rounding_rate": 0.03}}


def a_recipe(model: Path, out: Path, text: Path, **changes: Any) -> Recipe:
    changes = {"method": "mse+e2e", "options": STEPS, "eval": NOT_MEASURED, **changes}
    return small(model, out, text, **changes)


def tuner_of(recipe: Recipe, folder: Path, step: E2e) -> Finetune:
    """Prepare to learn what a finished folder without learning holds."""
    job = Job.prepare(replace(recipe, out=f"{folder}-tuned"))
    store = job.store(Folder(folder, 4))
    assert job.tokens_NT is not None
    solved = {index: store.solved(index) for index in job.blocks}
    return Finetune(
        job.ckpt, step, solved, job.tokens_NT, job.solver().context, device=torch.device("cpu"), seed=recipe.seed
    )


def divergence(source: Path, out: Path, tokens_NT: Tensor) -> float:
    ours, theirs = (F.log_softmax(our_logits(folder, tokens_NT).float(), -1) for folder in (out, source))
    return float(F.kl_div(ours, theirs, reduction="sum", log_target=True)) / tokens_NT.numel()


def test_nothing_to_learn_is_no_error(llama: Path, text: Path, tmp_path: Path) -> None:
    """At 8 bits scales cannot reach the next value that they can have, and norms may be left as well."""
    recipe = a_recipe(llama, tmp_path / "out", text, scheme=Scheme.parse("W8A16g32"), method="rtn+e2e")
    record = quantize(replace(recipe, options={"e2e": {"steps": 4, "norms": False}}))
    assert record.finetune["after"] == record.finetune["before"] and record.finetune["best_step"] == 0


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3", "gpt-neox"])
def test_the_loss_is_that_of_the_written_model(family: str, rounding: bool, text: Path, tmp_path: Path) -> None:
    source, out = tiny_folder(family, tmp_path / "source"), tmp_path / "out"
    recipe = a_recipe(source, out, text, method="mse", options={}, tune=AS_WRITTEN)
    quantize(recipe)
    tuner = tuner_of(replace(recipe, method="mse+e2e"), out, E2e(rounding=rounding))
    tokens_NT = Job.prepare(replace(recipe, method="mse+e2e", out=str(tmp_path / "new"))).tokens_NT
    assert tokens_NT is not None
    index = torch.arange(8)
    with torch.no_grad():
        loss = float(tuner._loss(index))  # pyright: ignore[reportPrivateUsage]
    assert loss == pytest.approx(divergence(source, out, tokens_NT), rel=0.02)


def test_the_loss_may_be_that_of_the_text(llama: Path, text: Path, tmp_path: Path) -> None:
    """Its next tokens, as transformers counts them, and it falls."""
    recipe = a_recipe(llama, tmp_path / "out", text, method="mse", options={}, tune=AS_WRITTEN)
    quantize(recipe)
    tuner = tuner_of(replace(recipe, method="mse+e2e"), tmp_path / "out", E2e(target="text"))
    index, logits_NTV = torch.arange(8), our_logits(tmp_path / "out", tuner.tokens_NT).float()
    expected = F.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), tuner.tokens_NT[:, 1:].flatten())
    with torch.no_grad():
        loss = float(tuner._loss(index))  # pyright: ignore[reportPrivateUsage]
    assert loss == pytest.approx(float(expected), rel=0.02) and len(tuner.tokens_NT) == 8
    learned = a_recipe(llama, tmp_path / "learned", text, options={"e2e": {**STEPS["e2e"], "target": "text"}})
    record = quantize(learned)
    assert record.finetune["after"] < record.finetune["before"]


@pytest.mark.parametrize("tokens", [1000, 10])
def test_gradients_are_those_of_a_small_move(
    tokens: int, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the logits of a whole sample at a time, and of parts of one."""
    monkeypatch.setattr(finetune, "LOGIT_BYTES", tokens * 4 * VOCABULARY)
    monkeypatch.setattr(finetune, "LEAST_TOGETHER", 1)
    recipe = a_recipe(llama, tmp_path / "out", text, method="mse", options={})
    scheme = replace(recipe.scheme, scale_dtype="float32")  # coarser ones would hide a small move
    recipe = replace(recipe, tune=replace(recipe.tune, dtype="float32"), scheme=scheme)
    quantize(recipe)
    tuner = tuner_of(replace(recipe, method="mse+e2e"), tmp_path / "out", E2e())
    for part in tuner.refinements().values():
        assert isinstance(part, Scales)
        part.rest = {name: tensor.float() for name, tensor in part.rest.items()}  # as are norms, which 16 bits round
    index = torch.arange(4)
    tuner._loss(index).backward()  # pyright: ignore[reportPrivateUsage]

    @torch.no_grad()
    def moved(parameter: Tensor, by: float) -> float:
        parameter.add_(by)
        found = float(tuner._loss(index))  # pyright: ignore[reportPrivateUsage]
        parameter.sub_(by)
        return found

    slopes = list[float]()
    for name, parameter in tuner.parts.named_parameters():
        assert parameter.grad is not None, name
        slopes.append((moved(parameter, 1e-3) - moved(parameter, -1e-3)) / 2e-3)
        assert float(parameter.grad.sum()) == pytest.approx(slopes[-1], abs=1e-3), name
    assert min(map(abs, slopes)) > 0.01, "each is far above what may differ"


@pytest.mark.parametrize("options", [STEPS, ROUNDING], ids=["scales", "codes"])
def test_it_brings_the_written_model_nearer(
    options: dict[str, dict[str, Any]], llama: Path, text: Path, tmp_path: Path
) -> None:
    quantize(a_recipe(llama, tmp_path / "plain", text, method="mse", options={}))
    record = quantize(a_recipe(llama, tmp_path / "out", text, options=options))
    tokens_NT = calibration_tokens(open_checkpoint(llama).tokenizer(), str(text), nsamples=8, seqlen=32, seed=0)
    before, after = (divergence(llama, tmp_path / name, tokens_NT) for name in ("plain", "out"))
    assert after < 0.95 * before
    assert record.finetune["after"] < record.finetune["before"]
    ours, plain = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    changed = {name for name in ours if not torch.equal(ours[name], plain[name])}
    kinds = ("weight_scale", "norm.weight")
    assert {kind for kind in kinds if any(name.endswith(kind) for name in changed)} == set(kinds)
    assert all(name.endswith((*kinds, "weight_packed") if options is ROUNDING else kinds) for name in changed)
    assert {name for name in ours if name.endswith("weight_scale")} <= changed


def test_the_whole_network_learns_on_whole_samples(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calib = Calib(dataset=str(text), nsamples=4, seqlen=25, piece=12, written=1)  # blocks see three pieces of 8 of each
    recipe = a_recipe(llama, tmp_path / "out", text, method="lwc+e2e", calib=calib)
    seen: list[Tensor] = []

    def stopped(*given: Any, **named: Any) -> None:
        seen.append(given[3])
        raise KeyboardInterrupt

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr("makeweight.pipeline.Finetune", stopped)
        quantize(recipe)
    whole_NT = calibration_tokens(open_checkpoint(llama).tokenizer(), str(text), nsamples=4, seqlen=25, seed=0)
    assert seen[0].shape == (5, 24) and torch.equal(seen[0][:4], whole_NT[:, :24])
    assert quantize(recipe).finetune["after"] <= quantize(recipe).finetune["before"]


def test_codes_that_moved_are_written(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a state with other codes is better is a matter of luck in a model this small: the last one is kept."""
    falling = itertools.count(0, -1)
    monkeypatch.setattr(Finetune, "_check", lambda _: float(next(falling)))
    quantize(a_recipe(llama, tmp_path / "plain", text, method="mse", options={}))
    quantize(a_recipe(llama, tmp_path / "out", text, options=ROUNDING))
    ours, plain = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert any(not torch.equal(ours[name], plain[name]) for name in ours if name.endswith("weight_packed"))


@pytest.mark.parametrize("rounding", [False, True])
def test_what_is_frozen_is_what_ran(rounding: bool, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = a_recipe(llama, tmp_path / "out", text, method="mse", options={}, tune=AS_WRITTEN)
    quantize(recipe)
    tuner = tuner_of(
        replace(recipe, method="mse+e2e"),
        tmp_path / "out",
        E2e(steps=4, rate=0.5, rounding=rounding, rounding_rate=2.0),
    )
    for _ in range(4):
        tuner.at.step += 1
        assert tuner._learn()  # pyright: ignore[reportPrivateUsage]
    for index, part in tuner.refinements().items():
        ran = part()
        for name, held in part.freeze().items():
            assert torch.equal(held.dequantize(torch.bfloat16), ran[name])
            assert held.scale_OG.min() > 0
            assert held.codes_OI.min() >= recipe.scheme.qmin and held.codes_OI.max() <= recipe.scheme.qmax
            assert torch.equal(held.codes_OI, tuner.solved[index][0][name].codes_OI) is not rounding
        assert all(tensor.min() >= LEAST for tensor in part.get_submodule("factors").parameters())


def test_codes_lie_in_a_file_while_the_network_learns(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, seen = a_recipe(llama, tmp_path / "out", text), []
    run = Finetune.run

    def spied(tuner: Finetune, *args: Any) -> dict[str, float]:
        store = Job.prepare(recipe).store(Folder(tmp_path / "out", 4))
        for index, (codes, _) in tuner.solved.items():
            solved, _ = store.solved(index)
            assert {name: held.digest() for name, held in codes.items()} == {n: h.digest() for n, h in solved.items()}
            maps = Path("/proc/self/maps")
            if maps.is_file():
                assert f"codes-{index}.scratch" in maps.read_text()
            seen.append(index)
        return run(tuner, *args)

    monkeypatch.setattr(Finetune, "run", spied)
    quantize(recipe)
    assert seen == [0, 1, 2]
    assert not list((tmp_path / "out").glob("*scratch*"))


def test_recomputing_changes_nothing_but_memory(llama: Path, text: Path, tmp_path: Path) -> None:
    digests, said = [], []
    for recompute in (True, False):
        options = {"e2e": {**ROUNDING["e2e"], "recompute": recompute}}
        recipe = a_recipe(llama, tmp_path / str(recompute), text, options=options)
        said.append(Job.prepare(recipe).estimate().memory_bytes)
        digests.append(quantize(recipe).digest)
    assert digests[0] == digests[1]
    assert said[0] < said[1]


def test_seconds_before_a_kill_count(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = a_recipe(llama, tmp_path / "out", text, method="mse", options={})
    quantize(recipe)
    tuner = tuner_of(replace(recipe, method="mse+e2e"), tmp_path / "out", E2e(steps=3, batch_size=2))
    saved: list[dict[str, Tensor]] = []
    tuner.at.seconds = 1000.0
    assert 1000 < tuner.run(saved.append)["seconds"] < 1900
    tuner.at.seconds = 0.0
    tuner.restore(saved[-1])
    assert tuner.at.seconds > 1000


@pytest.mark.parametrize(("samples", "steps"), [(40, 5), (40, 50), (1, 3), (2, 3)])
def test_only_samples_that_are_used_go_through_the_network(samples: int, steps: int) -> None:
    used, held, queue = finetune._drawn(samples, E2e(steps=steps, batch_size=2), 0)
    learned = used[queue]
    assert len(queue) == 2 * steps
    assert sorted({*used[held].tolist(), *learned.tolist()}) == used.tolist()
    if samples > 1:
        assert not {*used[held].tolist()} & {*learned.tolist()}
        epoch = samples - len(held)
        assert all(len(set(part.tolist())) == len(part) for part in learned.split(epoch)), "one epoch, each once"


def test_norms_of_a_wide_checkpoint_are_copied() -> None:
    """The typical size of a norm, which the rate follows, is that of the original whatever was learned since."""
    rest = {"input_layernorm.weight": torch.ones(4)}
    scheme, wide = Scheme(bits=3, group_size=32), torch.float32
    held = Scales({}, rest, Context(scheme=scheme, scale_dtype=wide, dtype=wide, steps=1), E2e())
    with torch.no_grad():
        next(iter(held.norms.values())).mul_(2)
    assert torch.equal(rest["input_layernorm.weight"], torch.ones(4))


def test_positions_that_are_learned_and_few_words(text: Path, tmp_path: Path) -> None:
    """All logits of a batch fit at once, its positions do not."""
    recipe = a_recipe(
        tiny_folder("opt", tmp_path / "source"),
        tmp_path / "out",
        text,
        calib=Calib(dataset=str(text), nsamples=4, seqlen=200, piece=200),
        options={"e2e": {"steps": 1, "batch_size": 2}},
    )
    assert math.isfinite(quantize(recipe).finetune["after"])


def test_one_sample_is_judged_by_pieces_of_it(llama: Path, text: Path, tmp_path: Path) -> None:
    calib = Calib(dataset=str(text), nsamples=1, seqlen=64, piece=32)
    recipe = a_recipe(llama, tmp_path / "out", text, method="lwc+e2e", calib=calib)
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        drawn = finetune._drawn
        patch.setattr(finetune, "_drawn", lambda samples, *rest: asked.append(samples) or drawn(samples, *rest))
        quantize(recipe)
    assert asked == [2]
    for few in ({"method": "rtn+e2e"}, {"calib": replace(calib, seqlen=32)}):
        with pytest.raises(UserError, match=r"nsamples=1 is too few for '.*', which is judged by samples"):
            Job.prepare(replace(recipe, out=str(tmp_path / "new"), **few))
