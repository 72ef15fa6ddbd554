"""Operations are counted as the formulas say, and the machine's rate is a positive number."""

from __future__ import annotations

import pytest
import torch

from makeweight.numerics.flops import band_flops, block_flops, elementwise_rate, matmul_rate, step_flops, step_rate

SHAPES = [(8, 16), (16, 8)]


def test_a_block_counts_its_linears_and_its_attention() -> None:
    assert block_flops(SHAPES, hidden=16, batch=2, seqlen=4) == 6 * 256 * 8 + 12 * 16 * 16 * 2
    assert block_flops(SHAPES, hidden=16, batch=4, seqlen=4) == 2 * block_flops(SHAPES, hidden=16, batch=2, seqlen=4)


def test_a_band_counts_its_products_and_never_more_than_the_whole_core() -> None:
    assert band_flops([(8, 16)], band=1) == 4 * 8 * 16 * 8 + 4 * 8 * 8 * 3
    assert band_flops([(8, 16)], band=7) == band_flops([(8, 16)], band=500)


def test_a_block_ahead_costs_two_thirds_of_a_trained_one() -> None:
    alone = step_flops(SHAPES, 16, 2, 4)
    assert step_flops(SHAPES, 16, 2, 4, ahead=3) == pytest.approx(3 * alone)
    assert step_flops(SHAPES, 16, 2, 4, band=0) - alone == band_flops(SHAPES, 0)


def test_the_rate_is_measured() -> None:
    assert matmul_rate(dtype=torch.float32, rows=64, size=64, seconds=0.01) > 1e6


def test_a_machine_too_busy_to_measure_is_measured_once() -> None:
    assert matmul_rate(dtype=torch.float32, rows=64, size=64, seconds=0.0) > 0


@pytest.mark.parametrize("group", [-1, 16])
def test_learning_is_measured_with_its_grid(group: int) -> None:
    rate = step_rate((96, 64), 32, group, dtype=torch.float32, seconds=0.0)
    assert 1e6 < rate < 1e15


def test_what_is_no_product_is_measured() -> None:
    assert 1e5 < elementwise_rate(dtype=torch.float32, seconds=0.0) < 1e14
