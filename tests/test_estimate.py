"""What a run will take is said before it starts, and follows what it is made of."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from makeweight.errors import UserError
from makeweight.estimate import memory, run, work
from makeweight.estimate.run import Estimate, estimate
from makeweight.job import Job
from makeweight.models.checkpoint import Checkpoint
from makeweight.models.load import open_checkpoint
from makeweight.numerics import attention
from makeweight.numerics.precision import fast_dtype
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import preflight
from makeweight.plan import compose
from makeweight.recipe import Calib, Recipe, Tune
from tests.runs import small
from tests.tiny import tiny_folder

RATE = 1e9


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_folder("llama", tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(work, "matmul_rate", lambda device, **kind: RATE)
    monkeypatch.setattr(work, "step_rate", lambda *work, **kind: RATE)
    monkeypatch.setattr(work, "elementwise_rate", lambda *work, **kind: RATE)
    scheme, calib = Scheme(bits=3, group_size=32), Calib(dataset="x", nsamples=64, seqlen=128)
    tune = Tune(steps=50, batch_size=2, dtype="bfloat16")
    return Recipe(model="m", out=str(tmp_path / "out"), scheme=scheme, calib=calib, tune=tune)


def of(recipe: Recipe, ckpt: Checkpoint, blocks: int = 3, method: str = "lwc+sde+cl") -> Estimate:
    return estimate(compose(method), recipe, ckpt, range(blocks), torch.device("cpu"))


def test_time_follows_steps_blocks_and_method(recipe: Recipe, ckpt: Checkpoint) -> None:
    whole = of(recipe, ckpt).seconds
    assert of(recipe, ckpt, blocks=1).seconds == pytest.approx(whole / 3, rel=0.01)
    twice = replace(recipe, tune=replace(recipe.tune, steps=100))
    assert 1.5 * whole < of(twice, ckpt).seconds < 2 * whole
    assert of(recipe, ckpt, method="lwc+sde").seconds < whole / 1.3  # the block ahead costs two thirds of its own
    assert of(recipe, ckpt, method="rtn").seconds < 0.1


def test_memory_follows_the_samples_and_the_look_ahead_but_not_the_depth(recipe: Recipe, ckpt: Checkpoint) -> None:
    whole = of(recipe, ckpt).memory_bytes
    assert of(recipe, ckpt, blocks=1).memory_bytes == whole
    more = replace(recipe, calib=replace(recipe.calib, nsamples=128))
    stream = 64 * 128 * 64 * 2
    assert of(more, ckpt).memory_bytes - whole == 3 * stream  # the quantized one, and two targets
    assert of(recipe, ckpt, method="lwc+sde").memory_bytes < whole


def test_what_reads_inputs_and_what_learns_at_the_end_is_counted(recipe: Recipe, ckpt: Checkpoint) -> None:
    for more, less in (
        ("lwc+aug", "lwc"),
        ("scale+lwc", "lwc"),
        ("clip+sde", "mse+sde"),
        ("lwc+e2e", "lwc"),
        ("rtn+e2e", "rtn"),
    ):
        assert of(recipe, ckpt, method=more).seconds > of(recipe, ckpt, method=less).seconds
    stream = 64 * 128 * 64 * 2
    assert of(recipe, ckpt, method="lwc+aug").memory_bytes - of(recipe, ckpt, method="lwc").memory_bytes == stream
    assert of(recipe, ckpt, method="scale+lwc").memory_bytes > of(recipe, ckpt, method="lwc").memory_bytes
    assert of(recipe, ckpt, method="rtn+e2e").memory_bytes > of(recipe, ckpt, method="rtn").memory_bytes


def test_text_of_the_models_own_and_curvature_are_counted(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("makeweight.calib.written.TOGETHER", 512)
    plain = of(recipe, ckpt, method="autoround")
    assert of(recipe, ckpt, method="flipround").seconds > plain.seconds  # probes, before any step
    writes = of(replace(recipe, calib=replace(recipe.calib, written=64)), ckpt, method="autoround")
    as_many = of(replace(recipe, calib=replace(recipe.calib, nsamples=128)), ckpt, method="autoround")
    assert writes.seconds > as_many.seconds > plain.seconds
    assert writes.memory_bytes > as_many.memory_bytes  # keys and values of 512 pieces, in bfloat16 too


def test_a_gpu_holds_no_samples_but_the_codes_of_the_whole_network(recipe: Recipe, ckpt: Checkpoint) -> None:
    def held(method: str, nsamples: int, blocks: int = 3) -> float:
        asked = replace(recipe, calib=replace(recipe.calib, nsamples=nsamples))
        shapes = {index: list(ckpt.linear_shapes(index).values()) for index in range(ckpt.n_blocks)}
        return memory.gpu_bytes(compose(method), asked, ckpt, shapes, range(blocks), torch.device("cpu"))

    assert held("rtn", 64) == 0
    assert held("lwc+cl", 64) == held("lwc+cl", 640) > held("lwc", 64) > 0
    assert held("lwc+e2e", 64) == held("lwc+e2e", 640) < of(recipe, ckpt, method="lwc+e2e").memory_bytes


def test_a_gpu_with_too_little_memory_is_named(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.prepare(small(llama, tmp_path / "out", text))
    expected, on_gpu = replace(job.estimate(), gpu_bytes=9e9), replace(job, device=torch.device("cuda"))
    monkeypatch.setattr(Job, "estimate", lambda _: expected)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for there, says in ((8e9, True), (1e10, False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, t=there: SimpleNamespace(total_memory=t))
        assert ("Its GPU has only 8.0 GB of memory" in on_gpu.outlook()) is says


def test_probabilities_that_attention_keeps_are_counted(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_them = of(recipe, ckpt, method="lwc").memory_bytes
    monkeypatch.setattr(attention, "KEPT_BYTES", 0)
    batch, heads, tokens = recipe.tune.batch_size, ckpt.config.num_attention_heads, recipe.calib.seqlen
    assert with_them - of(recipe, ckpt, method="lwc").memory_bytes == batch * heads * tokens**2
    cpu, gpu = (memory._activations(ckpt, recipe, 2, 2, torch.device(kind), blocks=3) for kind in ("cpu", "cuda"))
    assert gpu - cpu == (3 + 2) * 4 * 2 * heads * tokens**2, "in fp32 for three blocks, and two more for one of them"


def test_disk_follows_the_bits(recipe: Recipe, ckpt: Checkpoint) -> None:
    three = of(recipe, ckpt, method="lwc").disk_bytes
    tuned = of(recipe, ckpt, method="lwc+e2e").disk_bytes
    eight = of(replace(recipe, scheme=Scheme(bits=8, group_size=32)), ckpt, method="lwc").disk_bytes
    weights = sum(out * into for out, into in ckpt.linear_shapes().values()) * 3
    assert eight - three == pytest.approx(weights * 5 * (1 + 1 / 32) / 8)
    wide = of(replace(recipe, scheme=replace(recipe.scheme, scale_dtype="float32")), ckpt, method="lwc").disk_bytes
    assert wide - three == weights * 2 / 32, "four bytes for each scale where there were two"
    assert tuned - three == weights * (1 + 32 / 32), "all codes, and eight fp32 values for each scale"
    assert three < ckpt.stored_bytes()


def test_a_full_disk_is_refused_before_the_work(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: Usage(free=1000))
    with pytest.raises(UserError, match=r"out needs .* GB and its disk has 0\.0 GB: free some space\.$"):
        of(recipe, ckpt)


def test_a_run_that_goes_on_needs_room_for_the_rest_only(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    disk, out = int(of(recipe, ckpt).disk_bytes), Path(recipe.out)
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "shard").write_bytes(bytes(disk - 500))
    asked: list[Path] = []
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: asked.append(path) or Usage(free=1000))
    of(recipe, ckpt)
    assert asked == [out], "the folder may be a disk of its own"
    (out / "deep" / "shard").write_bytes(bytes(disk - 1500))
    with pytest.raises(UserError, match="free some space"):
        of(recipe, ckpt)


def test_disk_of_other_formats_and_of_a_packed_source(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = of(recipe, ckpt).disk_bytes
    assert of(replace(recipe, formats=("gptq",)), ckpt).disk_bytes == 2 * alone
    whole = of(replace(recipe, formats=("dense",)), ckpt).disk_bytes - alone
    assert whole == sum(torch.Size(shape).numel() for shape in ckpt.parameters().values()) * 2
    monkeypatch.setattr(ckpt, "stored_bytes", lambda: 1000)  # as if the file held 2 bits
    assert of(recipe, ckpt).disk_bytes == alone


def test_memory_of_a_block_and_of_wide_numbers(recipe: Recipe, ckpt: Checkpoint) -> None:
    weights = sum(out * into for out, into in ckpt.linear_shapes().values())
    assert of(recipe, ckpt, method="rtn").memory_bytes > memory.BASE_BYTES + 10 * weights
    wide = replace(recipe, tune=replace(recipe.tune, dtype="float32"))
    stream = 64 * 128 * 64
    more = of(wide, ckpt, method="lwc").memory_bytes - of(recipe, ckpt, method="lwc").memory_bytes
    assert more > 3 * 2 * stream + 2 * weights


def test_the_head_of_the_whole_network_is_as_wide_as_learning(recipe: Recipe, ckpt: Checkpoint) -> None:
    wide = replace(recipe, tune=replace(recipe.tune, dtype="float32"))
    outside = sum(math.prod(shape) for name, shape in ckpt.parameters().items() if not name.startswith("model.layers."))
    more = [of(wide, ckpt, method=m).memory_bytes - of(recipe, ckpt, method=m).memory_bytes for m in ("rtn+e2e", "rtn")]
    assert more[0] > 2 * outside and more[1] == 0


def test_evaluating_is_part_of_it(recipe: Recipe, ckpt: Checkpoint) -> None:
    def after(windows: int, recipe: Recipe) -> Estimate:
        return estimate(compose("rtn"), recipe, ckpt, range(3), torch.device("cpu"), windows=windows)

    both, alone = (after(40, replace(recipe, eval=replace(recipe.eval, baseline=b))) for b in (True, False))
    assert both.evaluate_seconds == 2 * alone.evaluate_seconds > 0
    assert after(80, recipe).evaluate_seconds == 2 * both.evaluate_seconds
    for baseline in (True, False):
        asked = replace(recipe, eval=replace(recipe.eval, baseline=baseline))
        more = after(4000, asked).memory_bytes - after(2000, asked).memory_bytes
        assert (
            more == (1 + baseline) * 2000 * 2048 * 64 * fast_dtype(ckpt.dtype, "cpu").itemsize
        )  # the original's states wait for the result's
    assert " and evaluating about " in after(10**6, recipe).sentence()


@pytest.mark.parametrize(
    ("seconds", "words"), [(1.0, "take a few seconds,"), (90.0, "take about 90 seconds,"), (600.0, "about 10 minutes,")]
)
def test_the_sentence(seconds: float, words: str) -> None:
    facts: dict[str, Any] = {"memory_bytes": 1.26e9, "disk_bytes": 9.9e7, "blocks": 30}
    sentence = Estimate(seconds=seconds, **facts).sentence()
    assert words in sentence
    assert sentence.endswith("1.3 GB of memory and 0.10 GB on disk.")


def test_preflight_writes_nothing(llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = preflight(small(llama, tmp_path / "out", text, scheme=Scheme.parse("W4A16")))
    start = "Weights of 4 bits, one scale per channel, asymmetric. Solving 3 blocks will take "
    assert said.startswith(start) and "GB of memory" in said and "This machine" not in said
    for load, says in ((0.0, False), (10.0 * (os.cpu_count() or 1), True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        said = preflight(small(llama, tmp_path / "out", text))
        assert ("Other programs are at work here" in said) is says
    monkeypatch.setattr("makeweight.job.machine_memory", lambda: 10**8)
    said = preflight(small(llama, tmp_path / "out", text))
    assert said.endswith("This machine has only 0.1 GB of memory: fewer or shorter samples (--nsamples, --seqlen) "
                         "take less.")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_learning_codes_of_the_whole_network_is_dear(recipe: Recipe, ckpt: Checkpoint) -> None:
    weights = sum(rows * columns for rows, columns in ckpt.linear_shapes().values()) * 3
    scales, codes = (
        estimate(
            compose("lwc+e2e", options={"e2e": {"rounding": rounding}}), recipe, ckpt, range(3), torch.device("cpu")
        )
        for rounding in (False, True)
    )
    assert codes.memory_bytes - scales.memory_bytes == pytest.approx(24 * weights)
    assert codes.disk_bytes - scales.disk_bytes == 32 * weights


def test_what_is_no_product_weighs_more_where_products_are_fast(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(products: float, elements: float) -> float:
        monkeypatch.setattr(work, "step_rate", lambda *work, **kind: products)
        monkeypatch.setattr(work, "elementwise_rate", lambda *work, **kind: elements)
        return of(recipe, ckpt).seconds - ckpt.stored_bytes() / work.READING

    alone, both = seconds(RATE, math.inf), seconds(RATE, RATE)
    assert seconds(RATE / 10, math.inf) == pytest.approx(10 * alone)
    assert seconds(RATE / 10, RATE) / (10 * alone) < both / alone < seconds(10 * RATE, RATE) / (alone / 10)
    assert both - alone == pytest.approx(seconds(10 * RATE, RATE) - alone / 10)


def test_what_is_solved_takes_no_more_time(recipe: Recipe, ckpt: Checkpoint) -> None:
    plan, cpu = compose("lwc+e2e"), torch.device("cpu")
    whole, rest, tuned = (
        estimate(plan, recipe, ckpt, range(3), cpu, left=left, tuned=tuned)
        for left, tuned in ((None, False), ([2], False), ([], True))
    )
    assert (whole.blocks, rest.blocks, tuned.blocks) == (3, 1, 0)
    assert tuned.seconds < rest.seconds < whole.seconds
    assert rest.memory_bytes == whole.memory_bytes
    first, last = (estimate(compose("lwc"), recipe, ckpt, range(3), cpu, left=[left]).seconds for left in (0, 2))
    assert first < last, "what is solved before a block is passed through"
    writes = replace(recipe, calib=replace(recipe.calib, written=64))
    assert estimate(plan, writes, ckpt, range(3), cpu, left=[], tuned=True).seconds == tuned.seconds
    assert tuned.sentence().startswith("All blocks are solved: what is left will take ")


def test_time_is_that_of_the_dtype_it_runs_in(
    recipe: Recipe, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def rate(*work: object, dtype: torch.dtype = torch.bfloat16, **where: object) -> float:
        asked.append(dtype)
        return RATE

    for kind in ("matmul_rate", "step_rate", "elementwise_rate"):
        monkeypatch.setattr(work, kind, rate)
    narrow = replace(recipe, tune=replace(recipe.tune, dtype="float32"))
    estimate(compose("lwc"), narrow, ckpt, range(3), torch.device("cpu"), windows=2)
    assert asked == [torch.float32, torch.float32, fast_dtype(ckpt.dtype, "cpu"), torch.float32]
