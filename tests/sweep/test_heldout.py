"""Who judges is the same for all, and learned from by none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makeweight.methods.finetune.e2e import E2e
from makeweight.sweep import finetune, heldout
from makeweight.sweep.fit import Fit, judging
from tests.sweep.problem import Problem, problem


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem(samples=12)


def test_few_samples_judge() -> None:
    assert [heldout.count(samples) for samples in (1, 2, 16, 48, 96, 512)] == [1, 1, 2, 6, 8, 8]


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(2, 200), pieces=st.integers(1, 8), seed=st.integers(0, 2**63 - 1))
def test_pieces_of_a_sample_stay_together(samples: int, pieces: int, seed: int) -> None:
    held, train = heldout.split(samples, seed, pieces=pieces)
    assert sorted(torch.cat([held, train]).tolist()) == list(range(samples * pieces))
    judging, learned = ({int(piece) // pieces for piece in part} for part in (held, train))
    assert judging.isdisjoint(learned) and len(judging) == heldout.count(samples)
    assert {int(piece) // pieces for piece in held[: len(judging)]} == judging, "as many of each where some are used"


def test_a_block_is_judged_by_few_pieces() -> None:
    assert [judging(*case) for case in ((1, 1), (1, 8), (12, 1), (128, 2), (128, 8))] == [1, 1, 1, 16, 32]


def test_of_one_sample_pieces_judge() -> None:
    held, train = heldout.split(1, 0, pieces=8)
    assert len(held) == 1 and sorted(torch.cat([held, train]).tolist()) == list(range(8))
    assert [part.tolist() for part in heldout.split(1, 0)] == [[0], [0]], "the only one judges and is learned from"


@pytest.mark.parametrize("seed", [0, 5])
def test_blocks_and_the_whole_network_hold_out_the_same(case: Problem, seed: int) -> None:
    """Every block, in pieces, and the whole network, whose samples are whole."""
    pieces, whole = 2, 6

    def fit(index: int) -> Fit:
        chain, judge = case.chain(index=index), case.judge(index=index)
        return Fit(chain, judge, case.hidden_NTD, (), steps=4, batch_size=2, checks=1, seed=seed, pieces=pieces)

    used, held, queue = finetune._drawn(whole, E2e(steps=20), seed)  # pyright: ignore[reportPrivateUsage]
    judges = set(used[held].tolist())
    for block in map(fit, range(3)):
        assert {piece // pieces for piece in block.held_out.tolist()} == judges
        assert not {piece // pieces for piece in block.train.tolist()} & judges
        assert len(block.held_out) == judging(whole, pieces)
    assert not set(used[queue].tolist()) & judges
    orders = [tuple(fit(index).train.tolist()) for index in range(3)]
    assert len(set(orders)) == 3, "blocks learn in orders of their own"
