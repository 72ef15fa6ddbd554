"""The curvature of a block's loss along its weights."""

from __future__ import annotations

import pytest
import torch

from makeweight.methods.grid.rounding import Rounding, RoundingGrid
from makeweight.sweep.curvature import curvature
from tests.sweep.problem import problem


def test_curvature_is_what_single_weights_cost() -> None:
    """The last linear's outputs enter the loss as they are, so its curvature is known, and is one row for all."""
    setting = problem()
    judge = setting.judge()
    block, targets = judge.blocks[0], setting.stream().targets(judge.blocks)
    weights = block.state()
    seen = []
    hook = block.module.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block(setting.hidden_NTD, weights)
    hook.remove()
    energy_NT = targets[0].float().square().sum(-1)
    exact_I = (2 / energy_NT.numel() / energy_NT.unsqueeze(-1) * seen[0].float().square()).sum((0, 1))
    batches = [torch.arange(16)] * 200
    column_O1, row_I = curvature(judge, weights, setting.hidden_NTD, targets, batches, 0)["mlp.down_proj"]
    assert torch.allclose((column_O1 * row_I).mean(0), exact_I, rtol=0.1)
    assert column_O1.std() < 0.1 * column_O1.mean()


def test_judged_places_add_up() -> None:
    """A loss over two blocks bends as its parts do; the first block's own part weighs its share."""
    setting = problem()
    found = {}
    for weights in ((1.0,), (1.0, 1.0), (1.0, 0.0)):
        judge = setting.judge(weights)
        targets = setting.stream().targets(judge.blocks)
        state = judge.blocks[0].state()
        found[weights] = curvature(judge, state, setting.hidden_NTD, targets, [torch.arange(16)] * 50, 0)
    for name, (column_O1, row_I) in found[(1.0,)].items():
        alone = (column_O1 * row_I).mean()
        beside, both = ((c * r).mean() for c, r in (found[(1.0, 0.0)][name], found[(1.0, 1.0)][name]))
        assert beside == pytest.approx(alone.item(), rel=0.15)
        assert both > 0.5 * alone


def test_only_what_learns_by_flips_asks_for_curvature() -> None:
    setting = problem()
    for step, asked in ((Rounding(), False), (Rounding(own=0.75, damp=0.5), True)):
        chain = setting.chain(grid=step)
        setting.fit(chain, steps=2).run()
        grid = chain.quantizer
        assert isinstance(grid, RoundingGrid)
        assert bool(grid.flips) == asked
