"""Every method of the zoo: nothing moves before learning, all learnables are reached, and codes are the forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.methods.base import (
    BlockStep,
    Context,
    FinetuneStep,
    Grid,
    GridStep,
    LossStep,
    Map,
    MapStep,
    RoundStep,
    State,
    TargetStep,
)
from makeweight.methods.grid.clip import Lwc, Rtn
from makeweight.methods.loss.augmented import Augmented
from makeweight.methods.loss.cross_layer import CrossLayer, Mse
from makeweight.methods.presets import PRESETS
from makeweight.methods.weight.sde import Sde
from makeweight.numerics.grid import clipped_grid
from makeweight.numerics.scheme import Scheme
from makeweight.sweep.chain import Chain, Steps
from tests.sweep.problem import Problem, problem

MAPS = {name: m.step for name, m in PRESETS.items() if isinstance(m.step, MapStep)}
GRIDS = {name: m.step for name, m in PRESETS.items() if isinstance(m.step, GridStep)}
DRIFTING = {name: step for name, step in MAPS.items() if isinstance(step, Sde)}
ROUNDINGS = {name: m.step for name, m in PRESETS.items() if isinstance(m.step, RoundStep)}
LOSSES = {name: m.step for name, m in PRESETS.items() if isinstance(m.step, LossStep)}
KINDS = (BlockStep, MapStep, GridStep, RoundStep, LossStep, TargetStep, FinetuneStep)
PAIRS = [(name, grid) for name in ("", *MAPS) for grid in GRIDS]  # every map with every grid, and every grid alone
LEARNING = [(name, grid) for name, grid in PAIRS if name or GRIDS[grid].learns]
ASYMMETRIC = {"hqq"}
SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (-1, 16)
    for symmetric in (False, True)
]
FORMATS = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32))


def a_state() -> State:
    """Matrices that are wide, tall, square, and one that has a group of zeros and is of low rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide.q_proj": (16, 64), "tall.up_proj": (48, 32), "square": (32, 32), "one-row": (1, 32)}
    state = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    state["poor"] = state["square"][:, :1] * torch.linspace(-1, 2, 32)
    state["poor"][:, :16] = 0
    state["one-row"][0, [0, 20]] = torch.tensor([-1.0, 1.0])  # each end rules a symmetric group
    return state


class SomeInputs:
    """Inputs that are larger in some channels, and go together."""

    def moment(self, name: str) -> Tensor:
        width = a_state()[name].shape[1]
        rows = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(3)).cumsum(1)
        return rows.T @ rows / len(rows)

    def square(self, name: str) -> Tensor:
        return self.moment(name).diagonal()


def context(scheme: Scheme | None = None, dtype: torch.dtype = torch.float32, **others: Any) -> Context:
    values = {"scheme": scheme or Scheme(bits=3, group_size=16), "scale_dtype": torch.bfloat16, "dtype": dtype}
    return Context(**{**values, "steps": 200, "inputs": SomeInputs(), **others})


def perturb(part: Map | Chain, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        part.constrain()


def build(name: str, grid: str, with_context: Context) -> Chain:
    return Chain.build(a_state(), Steps(maps=[MAPS[name]] if name else [], grid=GRIDS[grid]), with_context)


def test_the_zoo_is_sorted_by_stage() -> None:
    for name, method in PRESETS.items():
        assert sum(isinstance(method.step, kind) for kind in KINDS) == 1, name
        assert method.stage == method.step.stage, name
        assert method.summary and method.source, f"{name}: say what it does and where it comes from"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_maps_begin_at_the_identity(name: str, dtype: torch.dtype) -> None:
    state = a_state()
    moved = MAPS[name].build(state, context(dtype=dtype))(state)
    assert moved.keys() == state.keys()
    assert all(torch.equal(moved[n], state[n]) and moved[n].dtype == torch.float32 for n in state)


def test_rtn_takes_the_whole_range_and_lwc_begins_at_982_thousandths() -> None:
    state, where = a_state(), context()
    for step, factor in ((Rtn(), torch.tensor(1.0)), (Lwc(), torch.tensor(4.0).sigmoid()), (Lwc(logit=0), 0.5)):
        assert not isinstance(step, Lwc) or step.logit == 0 or float(factor) == pytest.approx(0.982, abs=5e-5)
        grid = step.build(state, where)
        for name, weight in state.items():
            factors = torch.ones(weight.shape[0], weight.shape[1] // 16) * factor
            plain = clipped_grid(
                weight, factors, factors, where.scheme, scale_dtype=torch.bfloat16, dtype=torch.float32
            )
            assert torch.equal(grid(state)[name], plain)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("name", "grid"), LEARNING)
def test_gradient_reaches_every_learnable(name: str, grid: str, symmetric: bool) -> None:
    if symmetric and grid in ASYMMETRIC:
        return
    chain = build(name, grid, context(Scheme(bits=3, group_size=16, symmetric=symmetric)))
    perturb(chain, 1e-3)
    chain.base = {n: 1.5 * w for n, w in chain.base.items()}  # zero-points learn from weights outside their range only
    generator = torch.Generator().manual_seed(2)
    torch.stack([(w * torch.randn(w.shape, generator=generator)).sum() for w in chain().values()]).sum().backward()
    named = {id(parameter): key for key, parameter in chain.named_parameters()}
    learnables = [parameter for group in chain.learnables() for parameter in group.params]
    for parameter in learnables:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), named[id(parameter)]
        assert parameter.grad.any(), f"nothing reaches {named[id(parameter)]}"
    learned = {id(parameter) for parameter in learnables}
    assert all(id(p) in learned or not p.numel() for p in chain.parameters()), "a parameter no rate stands for"
    assert len(learned) == len(learnables), "a parameter in two groups is stepped twice"


@pytest.mark.parametrize(("name", "grid"), LEARNING)
def test_what_learns_is_named_by_the_option_that_sets_its_rate(name: str, grid: str) -> None:
    for group in build(name, grid, context()).learnables():
        method, option = group.name.split(".")
        assert method in (name, grid) and getattr(PRESETS[method].step, option) == group.rate


@pytest.mark.parametrize("band", [0, 1, 16])
def test_gradient_reaches_every_entry_of_the_band_and_none_outside(band: int) -> None:
    state = {"w": a_state()["square"]}
    chain = Chain.build(state, Steps(maps=[Sde(band=band)], grid=Rtn()), context())
    (chain()["w"] * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).sum().backward()
    (group,) = chain.learnables()
    (entries,) = group.params
    assert entries.grad is not None
    rows = torch.arange(32).unsqueeze(1) + torch.arange(-band, band + 1)
    assert torch.equal(entries.grad != 0, (rows >= 0) & (rows < 32))


@pytest.mark.parametrize(("dtype", "scale_dtype"), FORMATS, ids=str)
@pytest.mark.parametrize(("name", "grid"), PAIRS)
def test_codes_are_the_forward(name: str, grid: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for scheme in SCHEMES:
        if scheme.symmetric and grid in ASYMMETRIC:
            continue
        chain = build(name, grid, context(scheme, dtype, scale_dtype=scale_dtype))
        perturb(chain)
        trained = chain()
        frozen = chain.freeze()
        weights, codes = frozen.weights, frozen.codes
        for linear, weight in trained.items():
            held = codes[linear]
            assert weight.dtype == dtype and held.scale_OG.dtype == scale_dtype
            assert torch.equal(weights[linear], weight), f"{scheme} {linear}"
            assert torch.equal(held.dequantize(dtype), weight), f"{scheme} {linear}"
            assert held.codes_OI.dtype == torch.int8 and (held.zero_OG is None) == scheme.symmetric
            assert scheme.qmin <= held.codes_OI.min() and held.codes_OI.max() <= scheme.qmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DRIFTING)
def test_drift_is_held_and_reported(name: str, dtype: torch.dtype) -> None:
    """||W' - W|| / ||W|| is what the report says, to the precision of the forward, and stays below its bound."""
    step = DRIFTING[name]
    state = {n: w for n, w in a_state().items() if n != "poor"}
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for size, bound in ((1e-3, 0.1), (50.0, 0.1), (50.0, 0.02)):
        drifting = replace(step, drift=bound).build(state, context(dtype=dtype))
        perturb(drifting, size)
        inside = {n: w for n, w in drifting.report().items() if n.startswith("drift.")}
        assert len(inside) == len(state) and max(inside.values()) <= bound * (1 + 1e-5)
        with torch.no_grad():
            moved = drifting(state)
        for n, weight in state.items():
            drift = float((moved[n] - weight).norm() / weight.norm())
            assert drift <= bound * (1 + tolerance)
            if step.band == 0:  # a wider band has entries outside the matrix, which only a test sets
                assert drift == pytest.approx(inside[f"drift.{n}"], rel=tolerance, abs=1e-6)
                assert size < 1 or drift == pytest.approx(bound, rel=tolerance)


def test_the_leading_block_drifts_too() -> None:
    state = {"w": a_state()["square"]}
    lead = Sde(band=0, lead=8, drift=0.05).build(state, context())
    (params,) = (group.params for group in lead.learnables())
    with torch.no_grad():
        params[1].fill_(9.0)
        lead.constrain()
        drift = float((lead(state)["w"] - state["w"]).norm() / state["w"].norm())
    assert drift == pytest.approx(0.05, rel=1e-3)
    assert lead.report() == {"drift.w": pytest.approx(0.05, rel=1e-5)}


def test_a_dead_matrix_reports_a_number() -> None:
    report = Sde(band=1).build({"dead": torch.zeros(8, 16)}, context()).report()
    assert all(value == value for value in report.values())


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem(scheme="W2A16g32", samples=16)


def fitted(case: Problem, *steps: MapStep) -> dict[str, str]:
    chain = case.chain(*steps)
    assert case.fit(chain, steps=8, checks=2).run().best_step > 0, "nothing was learned, so nothing is compared"
    return {name: quantized.digest() for name, quantized in chain.freeze().codes.items()}


def test_lsi_is_sde_of_band_zero(case: Problem) -> None:
    lsi, sde = PRESETS["lsi"].step, PRESETS["sde"].step
    assert isinstance(lsi, Sde) and isinstance(sde, Sde) and sde.band > 0
    ours = fitted(case, lsi)
    assert ours == fitted(case, replace(sde, band=0))
    assert ours != fitted(case, sde) and ours != fitted(case)


@pytest.mark.parametrize("band", [0, 2])
def test_sde_that_may_not_learn_is_lwc(case: Problem, band: int) -> None:
    assert fitted(case, Sde(band=band, rate=0.0)) == fitted(case)


def test_the_leading_block_reaches_beyond_the_band() -> None:
    state = {"w": a_state()["square"]}
    plain, lead = (Sde(band=0, lead=k).build(state, context()) for k in (0, 4))
    (own,) = (group.params for group in lead.learnables())
    assert [tuple(p.shape) for p in own] == [(32, 1), (4, 4)]
    with torch.no_grad():
        own[1][0, 3] = 0.01
        u, _, vt = torch.linalg.svd(state["w"])
        moved = lead(state)["w"] - state["w"]
        along = u.T @ moved @ vt.T
    assert along[0, 3].abs() > 10 * (along.abs().sum() - along[0, 3].abs())
    assert torch.equal(plain(state)["w"], state["w"])


def test_losses_weigh_the_block_itself_and_those_ahead() -> None:
    assert Mse().weights() == (1.0,)
    assert CrossLayer(ahead=2, decay=0.5).weights() == (1.0, 0.5, 0.25)
    for name, step in LOSSES.items():
        weights = step.weights()
        assert weights[0] > 0 and all(w > 0 for w in weights), f"{name}: the block's own error always counts"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sde(band=-1), "band -1 and lead 0 cannot be negative; use 0"),
        (lambda: Sde(lead=-2), "lead -2 cannot be negative"),
        (lambda: Sde(drift=0.0), "drift 0.0 must lie between 0 and 1"),
        (lambda: Sde(drift=float("nan")), "drift nan"),
        (lambda: CrossLayer(ahead=0), "ahead 0 must be at least 1"),
        (lambda: CrossLayer(decay=-1.0), "decay -1.0 above 0"),
        (lambda: Augmented(weight=0.0), "weight 0.0 must be above 0"),
    ],
)
def test_refusals_are_sentences(make: type[Sde], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        make()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_group_size_that_does_not_fit_names_the_linear() -> None:
    state: dict[str, Tensor] = {"mlp.down_proj": torch.randn(4, 48)}
    for step in GRIDS.values():
        with pytest.raises(UserError, match=r"group size 32 does not divide the 48 inputs of mlp\.down_proj"):
            grid: Grid = step.build(state, context(Scheme(bits=3, group_size=32)))
            grid(state)


def test_lsi_and_sde_refuse_each_other() -> None:
    lsi, sde = PRESETS["lsi"].step, PRESETS["sde"].step
    reason = sde.conflicts((lsi,))
    assert reason is not None and "sde contains lsi" in reason
    assert lsi.conflicts((sde,)) == reason
    assert all(step.conflicts((PRESETS["lwc"].step,)) is None for step in MAPS.values())
