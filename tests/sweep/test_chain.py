"""A chain's codes are its forward, a committed block is the trained one, and blocks ahead only pass gradients on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from makeweight.methods.base import Context, Grid, Map, MapStep, Stage, State
from makeweight.methods.grid.clip import Lwc, Rtn
from makeweight.methods.weight.sde import Sde
from makeweight.numerics.qtensor import QTensor
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Chain
from tests.sweep.problem import Problem, problem

FAMILIES = ("llama", "llama-tied", "gemma2", "opt", "phi3")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem()


def weights_of(block: Block) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in block.module.state_dict().items()}


def unchanged(block: Block, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in block.module.state_dict().items())


def move(chain: Chain, size: float = 0.05) -> None:
    """Put every learnable somewhere else."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        chain.constrain()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_committed_block_is_the_trained_one(family: str, dtype: torch.dtype) -> None:
    case = problem(family, dtype=dtype, samples=3, tokens=6, layers=2)
    block = case.blocks[0]
    chain = case.chain(Sde(band=3))
    move(chain)
    trained = block(case.hidden_NTD, chain())
    original = block(case.hidden_NTD)
    frozen = chain.freeze()
    weights, codes = frozen.weights, frozen.codes
    assert set(weights) == set(block.linears) == set(codes)
    before = weights_of(block)
    block.write(weights)
    with torch.no_grad():
        assert torch.equal(block(case.hidden_NTD), trained)
    assert not torch.equal(trained, original)
    for name, value in block.module.state_dict().items():
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in codes:
            assert value.dtype == dtype
            assert torch.equal(value, codes[linear].dequantize(dtype))
        else:
            assert torch.equal(value, before[name]), f"{name} is not a linear's weight and must stay"


def test_other_weights_do_not_touch_the_module(case: Problem) -> None:
    block, before = case.blocks[0], weights_of(case.blocks[0])
    state = block.state()
    for name, weight in state.items():
        weight.zero_()
        assert block.module.get_parameter(f"{name}.weight").any(), "state() hands out copies"
    moved = block(case.hidden_NTD, state)
    assert not torch.equal(moved, block(case.hidden_NTD))
    assert unchanged(block, before)


def test_the_blocks_own_weights_give_the_blocks_own_output(case: Problem) -> None:
    block = case.blocks[1]
    assert torch.equal(block(case.hidden_NTD, block.state()), block(case.hidden_NTD))


@pytest.mark.parametrize("ahead", [1, 2])
def test_gradients_pass_through_the_blocks_ahead(case: Problem, ahead: int) -> None:
    before = [weights_of(block) for block in case.blocks]
    chain = case.chain(Sde(band=1))
    judge = case.judge((1.0,) * (ahead + 1))
    targets = case.stream().targets(judge.blocks)
    errors = judge.errors(chain(), case.hidden_NTD, targets)
    assert len(errors) == ahead + 1
    params = [parameter for group in chain.learnables() for parameter in group.params]
    near = torch.autograd.grad(errors[0], params, retain_graph=True)
    far = torch.autograd.grad(errors[-1], params)
    for own, later in zip(near, far, strict=True):
        assert torch.isfinite(later).all() and later.any(), "what the last block ahead says must reach every learnable"
        assert not torch.allclose(own, later)
    case.fit(chain, (1.0,) * (ahead + 1), steps=4).run()
    for block, values in zip(case.blocks, before, strict=True):
        assert unchanged(block, values)
        assert all(parameter.grad is None for parameter in block.module.parameters())


def test_the_judge_compares_each_block_with_its_own_target(case: Problem) -> None:
    judge = case.judge((1.0, 1.0, 1.0))
    targets = case.stream().targets(judge.blocks)
    with torch.no_grad():
        exact = judge.errors(case.blocks[0].state(), case.hidden_NTD, targets)
        assert all(error.item() < 1e-10 for error in exact)
        off = judge.errors(case.chain(grid=Rtn())(), case.hidden_NTD, targets)
        assert all(error.item() > 1e-4 for error in off)
        swapped = judge.errors(case.blocks[0].state(), case.hidden_NTD, targets[::-1])
    assert swapped[1].item() < 1e-10 < swapped[0].item()


def test_the_loss_is_the_weighted_mean(case: Problem) -> None:
    judge = case.judge((1.0, 0.5, 0.25))
    assert judge.loss([torch.tensor(0.2), torch.tensor(0.4), torch.tensor(0.8)]).item() == pytest.approx(0.6 / 1.75)
    assert judge.loss([torch.tensor(0.3)] * 3).item() == pytest.approx(0.3)


class Doubling(Map):
    """Stands for an exact step that is not the identity on the weights."""

    def forward(self, state: State) -> State:
        return {name: 2 * weight for name, weight in state.items()}


class Double(MapStep):
    stage = Stage.WEIGHT

    def __init__(self, seen: list[State]) -> None:
        object.__setattr__(self, "seen", seen)

    def build(self, state: State, context: Context) -> Map:
        self.__dict__["seen"].append(state)
        return Doubling()


def test_maps_are_built_on_the_weights_that_reach_them(case: Problem) -> None:
    seen: list[State] = []
    chain = case.chain(Double(seen), Double(seen), grid=Rtn())
    state = case.blocks[0].state()
    assert len(seen) == 2
    assert all(torch.equal(seen[k][name], 2**k * state[name]) for k in range(2) for name in state)
    assert all(torch.equal(chain.moved()[0][name], 4 * state[name]) for name in state)


def test_maps_act_in_the_order_given(case: Problem) -> None:
    """The grid sits after every map, and the base is never written."""
    chain = case.chain(Sde(band=0), Sde(band=1))
    base = {name: weight.clone() for name, weight in chain.base.items()}
    move(chain)
    first, second = chain.maps
    assert all(torch.equal(chain.moved()[0][n], second(first(base))[n]) for n in base)
    assert not any(torch.equal(chain.moved()[0][n], base[n]) for n in base)
    chain.freeze()
    assert all(torch.equal(chain.base[n], base[n]) for n in base)
    assert [group.name for group in chain.learnables()] == ["lsi.rate", "sde.rate", "lwc.rate"]


def test_learned_state_reads_back(case: Problem) -> None:
    steps: tuple[MapStep, ...] = (Sde(band=2, lead=3),)
    chain, again = case.chain(*steps), case.chain(*steps)
    move(chain)
    again.load_state_dict(chain.state_dict())
    ours, theirs = chain.freeze().codes, again.freeze().codes
    assert all(ours[name].digest() == theirs[name].digest() for name in ours)
    learned = sum(parameter.numel() for parameter in chain.parameters())
    assert sum(value.numel() for value in chain.state_dict().values()) == learned


class Liar(Grid):
    """A grid one of whose codes is off by one."""

    def __init__(self, honest: Grid) -> None:
        super().__init__()
        self.honest = honest

    def forward(self, state: State) -> State:
        return self.honest(state)

    def codes(self, state: State) -> dict[str, QTensor]:
        codes = self.honest.codes(state)
        name = next(iter(codes))
        wrong = codes[name].codes_OI.clone()
        wrong[0, 0] += 1 if wrong[0, 0] < 0 else -1
        return codes | {name: replace(codes[name], codes_OI=wrong)}


def test_codes_that_do_not_stand_for_the_weights_are_refused(case: Problem) -> None:
    state = case.blocks[0].state()
    chain = Chain(state, [], Liar(Lwc().build(state, case.context)))
    with pytest.raises(RuntimeError, match=f"the codes of {next(iter(state))} do not stand"):
        chain.freeze()
