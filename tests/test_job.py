"""What a recipe becomes once it is checked against its model and its texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from makeweight.job import Job
from makeweight.recipe import Calib
from makeweight.sweep import heldout
from tests.runs import small


def test_learning_sees_pieces_of_the_samples(llama: Path, tmp_path: Path, text: Path) -> None:
    recipe = small(
        llama, tmp_path / "out", text, method="lwc+e2e", calib=Calib(dataset=str(text), nsamples=4, seqlen=25)
    )
    whole, cut = Job.prepare(recipe), Job.prepare(replace(recipe, calib=replace(recipe.calib, piece=12, written=1)))
    assert whole.tokens_NT is not None and cut.tokens_NT is not None and whole.plan.finetune and cut.plan.finetune
    assert whole.tokens_NT.shape == (4, 25)
    assert torch.equal(cut.tokens_NT, whole.tokens_NT[:, :24].reshape(12, 8)), "pieces are equal, and none is too long"
    assert cut.whole_NT is not None and torch.equal(cut.whole_NT, whole.tokens_NT[:, :24]), "the network sees it whole"
    assert cut.cut.calib.samples == 15
    assert cut.solver().tune.batch_size == 3 * recipe.tune.batch_size
    assert cut.plan.finetune.batch_size == whole.plan.finetune.batch_size
    assert cut.identity() != whole.identity()
    gptq = replace(recipe, method="gptq", calib=replace(recipe.calib, piece=12))
    tokens_NT = Job.prepare(gptq).tokens_NT
    assert tokens_NT is not None and tokens_NT.shape == (4, 25), "nothing is learned"


@pytest.mark.parametrize(("seqlen", "piece"), [(25, 12), (20, 3), (24, 7)])
def test_there_are_as_many_pieces_as_is_counted_on(
    seqlen: int, piece: int, llama: Path, tmp_path: Path, text: Path
) -> None:
    calib = Calib(dataset=str(text), nsamples=2, seqlen=seqlen, piece=piece)
    job = Job.prepare(small(llama, tmp_path / "out", text, method="lwc", calib=calib))
    assert job.tokens_NT is not None
    assert job.tokens_NT.shape == (job.cut.calib.nsamples, job.cut.calib.seqlen)


def test_the_model_goes_on_from_no_sample_that_judges(llama: Path, tmp_path: Path, text: Path) -> None:
    calib = Calib(dataset=str(text), nsamples=6, seqlen=24, piece=12, written=18)
    job = Job.prepare(small(llama, tmp_path / "out", text, method="lwc", calib=calib))
    assert job.tokens_NT is not None
    judging, _ = heldout.split(24, job.recipe.seed, pieces=2)
    judges = [piece for piece in judging.tolist() if piece < 12]
    assert judges, "the draw of this seed has some of the given samples among those that judge"
    prompts = {tuple(row) for row in job.prompts().tolist()}
    assert prompts == {tuple(row) for place, row in enumerate(job.tokens_NT.tolist()) if place not in judges}


def test_the_only_sample_is_gone_on_from_even_where_it_judges(llama: Path, tmp_path: Path, text: Path) -> None:
    calib = Calib(dataset=str(text), nsamples=1, seqlen=24, written=1)
    for seed in range(4):
        job = Job.prepare(small(llama, tmp_path / "out", text, method="lwc", calib=calib, seed=seed))
        assert job.tokens_NT is not None and torch.equal(job.prompts(), job.tokens_NT)
