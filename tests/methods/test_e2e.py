"""How fast scales of the whole network are learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from makeweight.methods.base import State
from makeweight.methods.finetune.e2e import E2e, coarseness
from makeweight.methods.grid.clip import Rtn
from makeweight.numerics.scheme import Scheme
from tests.methods.test_zoo import context


def a_state(size: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(0)
    return {f"of {rows}": size * torch.randn(rows, 32, generator=generator) for rows in (8, 48)}


def coarse(state: State, bits: int) -> float:
    where = context(Scheme(bits=bits, group_size=16))
    return coarseness(Rtn().build(state, where).codes(state))


@pytest.mark.parametrize("norm", ["input_layernorm", "ln_1", "self_attn.q_norm", "ln_attn"])
def test_norms_are_found_whatever_they_are_called(norm: str) -> None:
    state, where = a_state(), context(Scheme(bits=4, group_size=16))
    codes = Rtn().build(state, where).codes(state)
    name = next(iter(codes))
    rest = {f"{norm}.weight": torch.ones(4), f"{name}.bias": torch.ones(4), "router.weight": torch.ones(4, 4)}
    refinement = E2e().build(codes, rest, where)
    assert list(refinement.learned_rest()) == [f"{norm}.weight"]


def test_coarseness_is_the_square_of_the_step() -> None:
    assert coarse(a_state(), 7) / coarse(a_state(), 8) == pytest.approx((255 / 127) ** 2, rel=0.02)


def test_coarseness_is_relative_to_the_weights() -> None:
    assert coarse(a_state(size=1024.0), 3) == coarse(a_state(), 3)
    assert coarse({"nothing": torch.zeros(4, 16)}, 3) == 1


def test_groups_of_zeros_have_no_step() -> None:
    state = a_state()
    padded = {name: torch.cat([weight_OI, torch.zeros_like(weight_OI)]) for name, weight_OI in state.items()}
    assert coarse(padded, 4) == pytest.approx(coarse(state, 4))


@pytest.mark.parametrize(("bits", "steps", "learned"), [(8, 120, False), (8, 6000, True), (4, 120, True)])
def test_scales_that_cannot_reach_their_next_value_are_left(bits: int, steps: int, learned: bool) -> None:
    """A bfloat16 scale moves by 2**-8 of itself or more; at 8 bits 120 steps come to a twentieth of that at most."""
    where = replace(context(Scheme(bits=bits, group_size=16)), scale_dtype=torch.bfloat16)
    codes = Rtn().build(a_state(), where).codes(a_state())
    refinement = E2e(steps=steps).build(codes, {"norm.weight": torch.ones(4)}, where)
    names = ["e2e.rate"] if learned else []
    assert [group.name for group in refinement.learnables()] == [*names, "e2e.norm_rate"]
    assert all(weight_OI.requires_grad == learned for name, weight_OI in refinement().items() if name in codes)


def test_norms_are_judged_as_they_are_stored() -> None:
    where = context(Scheme(bits=4, group_size=16))
    codes = Rtn().build(a_state(), where).codes(a_state())
    refinement = E2e().build(codes, {"norm.weight": torch.ones(64, dtype=torch.bfloat16)}, where)
    with torch.no_grad():
        for group in refinement.learnables():
            if group.name == "e2e.norm_rate":
                group.params[0].add_(0.01 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    judged = refinement()["norm.weight"]
    assert judged.dtype == torch.float32 and judged.requires_grad
    assert torch.equal(judged, refinement.learned_rest()["norm.weight"].float())
    assert not torch.equal(judged, torch.ones(64))
