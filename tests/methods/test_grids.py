"""Grids that learn their scales, that choose ranges from weights alone, and error feedback within any of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.methods.base import Grid, GridStep
from makeweight.methods.grid.clip import GroupedGrid, Rtn
from makeweight.methods.grid.gptq import Gptq
from makeweight.methods.grid.rounding import REACH, Rounding, RoundingGrid
from makeweight.methods.grid.search import Hqq, MseRange, Percentile, Start
from makeweight.methods.grid.stepsize import LEAST, StepGrid, StepSize
from makeweight.numerics.scheme import Scheme
from makeweight.plan import compose
from tests.methods.test_zoo import ASYMMETRIC, FORMATS, GRIDS, SCHEMES, a_state, context, perturb

CHOOSING = {name: step for name, step in GRIDS.items() if isinstance(step, MseRange | Percentile | Hqq)}
STARTS: dict[Start, GridStep] = {"inputs": MseRange(inputs=True), "mse": MseRange(), "range": Rtn()}
ROUNDED = [name for name, step in GRIDS.items() if not isinstance(step, Rounding)]


def error(grid: Grid, state: dict[str, Tensor], power: float = 2.0) -> float:
    with torch.no_grad():
        return sum(float((weight - grid(state)[name]).abs().pow(power).sum()) for name, weight in state.items())


@pytest.mark.parametrize(("dtype", "scale_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize(("start", "same"), STARTS.items(), ids=STARTS)
def test_stepsize_begins_at_the_ranges_that_were_asked_for(
    start: Start, same: GridStep, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    state = a_state()
    for scheme in SCHEMES:
        where = context(scheme, dtype, scale_dtype=scale_dtype)
        grid, plain = StepSize(start=start).build(state, where), same.build(state, where)
        for name in state:
            assert torch.equal(grid(state)[name], plain(state)[name])
            assert grid.codes(state)[name].digest() == plain.codes(state)[name].digest()


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_steps_stay_where_they_are_allowed(symmetric: bool) -> None:
    where, state = context(Scheme(bits=3, group_size=16, symmetric=symmetric)), a_state()
    grid = StepSize().build(state, where)
    assert isinstance(grid, StepGrid)
    names = ["stepsize.rate", "stepsize.zero_rate"][: 1 if symmetric else 2]
    assert [group.name for group in grid.learnables()] == names
    perturb(grid, 1e3)
    assert all(factor.min() == LEAST for factor in grid.factors.values())
    assert symmetric or torch.cat([zero.flatten() for zero in grid.zeros.values()]).aminmax() == (-4, 3)
    for name, quantized in grid.codes(state).items():
        assert (quantized.scale_OG > 0).all() and quantized.scale_OG.isfinite().all(), name


def test_zero_points_begin_between_codes() -> None:
    where, state = context(Scheme(bits=3, group_size=16)), a_state()
    grid = StepSize().build(state, where)
    assert isinstance(grid, StepGrid)
    parts = torch.cat([(zero - zero.round()).flatten() for zero in grid.zeros.values()])
    inside_count = int((parts != 0).sum())
    assert inside_count > 0.8 * parts.numel() and parts.abs().max() < 0.5  # else no step that learning takes moves one


@pytest.mark.parametrize(("descent", "steps", "way"), [("sign", 30, 1.0), ("adam", 400, 1.0), ("adam", 30, 30 / 200)])
def test_short_runs_of_adam_take_no_longer_steps(descent: Literal["adam", "sign"], steps: int, way: float) -> None:
    where = replace(context(Scheme(bits=3, group_size=16)), steps=steps)
    (group,) = Rounding(descent=descent).build(a_state(), where).learnables()
    assert group.rate * group.unit * steps == pytest.approx(2 * REACH * way)


@pytest.mark.parametrize("descent", ["adam", "sign"])
def test_rounding_may_travel_a_whole_run_to_the_next_code(descent: Literal["adam", "sign"]) -> None:
    state, where = a_state(), context(Scheme(bits=3, group_size=16))
    grid = Rounding(descent=descent).build(state, where)
    (group,) = grid.learnables()
    assert (group.descent, group.rate * group.unit * where.steps) == (descent, 2 * REACH)
    perturb(grid, 1e3)
    assert isinstance(grid, RoundingGrid)
    assert all(offset_OI.abs().max() == REACH for offset_OI in grid.offsets.values())


@pytest.mark.parametrize(("start", "same"), STARTS.items(), ids=STARTS)
def test_rounding_begins_at_the_ranges_that_were_asked_for(start: Start, same: GridStep) -> None:
    state = a_state()
    for scheme in SCHEMES:
        grid, plain = Rounding(start=start).build(state, context(scheme)), same.build(state, context(scheme))
        for name, quantized in plain.codes(state).items():
            assert grid.codes(state)[name].digest() == quantized.digest()


def test_steps_do_not_follow_the_weights() -> None:
    state = a_state()
    for step in (StepSize(), Hqq()):
        grid = step.build(state, context())
        before = grid.codes(state)
        for name, quantized in grid.codes({name: 3 * weight for name, weight in state.items()}).items():
            assert torch.equal(quantized.scale_OG, before[name].scale_OG)
            assert not torch.equal(quantized.codes_OI, before[name].codes_OI)


def test_a_step_of_a_scale_is_relative() -> None:
    """Weights a thousand times as large learn the same factors from the same relative loss."""
    codes, where = [], context(Scheme(bits=2, group_size=16))
    for size in (1.0, 1024.0):
        state = {name: weight * size for name, weight in a_state().items() if name not in ("poor", "one-row")}
        grid = StepSize(start="range").build(state, replace(where, scale_dtype=torch.float32))
        groups = [{"params": group.params, "lr": group.rate * group.unit} for group in grid.learnables()]
        adam = torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-12)
        before = error(grid, state)
        for _ in range(30):
            adam.zero_grad()
            rounded = grid(state)
            torch.stack([(rounded[name] - weight).square().sum() for name, weight in state.items()]).sum().backward()
            adam.step()
            with torch.no_grad():
                grid.constrain()
        assert error(grid, state) < 0.9 * before
        codes.append(grid.codes(state))
    for name, quantized in codes[0].items():
        assert torch.equal(quantized.codes_OI, codes[1][name].codes_OI)


@pytest.mark.parametrize("name", CHOOSING)
def test_chosen_ranges_are_chosen_once(name: str) -> None:
    state = a_state()
    step = CHOOSING[name]
    assert not step.learns
    grid = step.build(state, context())
    assert not list(grid.learnables()) and not list(grid.parameters()) and not grid.state_dict()
    again = step.build(state, context())
    assert all(again.codes(state)[n].digest() == quantized.digest() for n, quantized in grid.codes(state).items())


def test_chosen_factors_follow_the_weights() -> None:
    """A weight twice as large has the same codes, one that has moved keeps the share of its range."""
    state = {name: weight for name, weight in a_state().items() if name != "poor"}
    for step in (MseRange(), Percentile(share=0.95)):
        grid = step.build(state, context())
        doubled = grid.codes({name: 2 * weight for name, weight in state.items()})
        for name, quantized in grid.codes(state).items():
            assert torch.equal(doubled[name].codes_OI, quantized.codes_OI)
            assert torch.equal(doubled[name].scale_OG, 2 * quantized.scale_OG)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_mse_is_nearer_than_rtn_in_every_group(symmetric: bool) -> None:
    state, where = a_state(), context(Scheme(bits=2, group_size=16, symmetric=symmetric))
    for power in (2.0, 2.4):
        grid, plain = MseRange(power=power).build(state, where), Rtn().build(state, where)
        for name, weight in state.items():
            ours, theirs = (
                (g(state)[name] - weight).unflatten(1, (-1, 16)).abs().pow(power).sum(-1) for g in (grid, plain)
            )
            assert torch.all(ours <= theirs * (1 + 1e-6))
        assert error(grid, state, power) < 0.85 * error(plain, state, power)


def test_ranges_found_by_inputs_cost_every_group_of_outputs_less() -> None:
    """As far as each input by itself tells, which is what is counted."""
    state, where = a_state(), context(Scheme(bits=2, group_size=16))
    assert where.inputs is not None
    grids, better = [MseRange(inputs=inputs).build(state, where) for inputs in (True, False)], 0
    for name, weight_OI in state.items():
        square_I = where.inputs.square(name)
        ours, theirs = (
            ((grid(state)[name] - weight_OI).square() * square_I).unflatten(1, (-1, 16)).sum(-1) for grid in grids
        )
        assert torch.all(ours <= theirs * (1 + 1e-6))
        better += int((ours < 0.95 * theirs).sum())
    assert better > 10
    assert MseRange(inputs=True).reads_inputs == "squares" and not MseRange().reads_inputs


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fewer_bits_cut_more(bits: int) -> None:
    state = {"normal": torch.randn(24, 128, generator=torch.Generator().manual_seed(0))}
    where = context(Scheme(bits=bits, group_size=32))
    share = {2: 0.95, 3: 0.99}.get(bits, 0.999)
    ours, asked, plain = (step.build(state, where) for step in (Percentile(), Percentile(share=share), Rtn()))
    assert error(ours, state, 2.0) == error(asked, state, 2.0)
    assert bits > 3 or error(ours, state, 2.0) < 0.95 * error(plain, state, 2.0)


def test_a_full_share_is_rtn() -> None:
    state, where = a_state(), context()
    for step in (MseRange(least=1.0), Percentile(share=1.0)):
        for name, quantized in step.build(state, where).codes(state).items():
            assert quantized.digest() == Rtn().build(state, where).codes(state)[name].digest()


def test_hqq_is_nearer_by_its_own_measure() -> None:
    state = a_state()
    where = context(Scheme(bits=3, group_size=16))
    assert error(Hqq().build(state, where), state, 0.7) < 0.97 * error(Rtn().build(state, where), state, 0.7)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("mse", "power", 0.0),
        ("mse", "least", 0.0),
        ("mse", "least", 1.5),
        ("mse", "step", 0.0),
        ("mse", "step", float("nan")),
        ("percentile", "share", 0.5),
        ("percentile", "share", 1.1),
        ("hqq", "power", 1.0),
        ("hqq", "steps", 0),
    ],
)
def test_impossible_settings_are_sentences(method: str, option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{method}: .*{option} ") as caught:
        compose(method, options={method: {option: value}})
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("name", ROUNDED)
def test_error_feedback_rounds_within_every_grid(name: str, symmetric: bool, act_order: bool) -> None:
    if symmetric and name in ASYMMETRIC:
        return
    state = a_state()
    where = context(Scheme(bits=3, group_size=16, symmetric=symmetric))
    step: GridStep = GRIDS[name]
    grid = step.build(state, where)
    perturb(grid, 0.05)
    assert isinstance(grid, GroupedGrid)
    generator = torch.Generator().manual_seed(1)
    weight_OI = state["wide.q_proj"]
    inputs_TI = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    alone = grid.codes(state)["wide.q_proj"]
    fed, _ = Gptq(act_order=act_order).codes("wide.q_proj", weight_OI, inputs_TI.T @ inputs_TI, grid, where)
    fixed = name in ("stepsize", "hqq")  # the others follow the weights, which feedback has moved
    if act_order or fixed:
        assert torch.equal(fed.scale_OG, alone.scale_OG)
        assert (fed.zero_OG is None) == symmetric
        assert fed.zero_OG is None or (alone.zero_OG is not None and torch.equal(fed.zero_OG, alone.zero_OG))
    errors = [((held.dequantize(torch.float32) - weight_OI) @ inputs_TI.T).norm() for held in (fed, alone)]
    assert errors[0] < 0.8 * errors[1]


def test_grids_and_error_feedback_compose_or_are_refused() -> None:
    for name in ROUNDED:
        assert compose(f"gptq+{name}").names == (name, "gptq")
        assert compose(f"{name}+sde+gptq").grid == GRIDS[name]
    with pytest.raises(UserError, match="gptq would round again what learned rounding has chosen"):
        compose("flipround+gptq")
