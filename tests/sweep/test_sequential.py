"""Linears are rounded in the order of the network, each with the inputs that it will really get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from makeweight.errors import UserError
from makeweight.methods.base import Context, Grid
from makeweight.methods.grid.clip import Lwc, Rtn
from makeweight.methods.grid.gptq import Gptq
from makeweight.methods.weight.sde import Sde
from makeweight.numerics.errors import token_error
from makeweight.sweep.chain import Chain, Frozen
from makeweight.sweep.inputs import Moments, shared_inputs
from makeweight.sweep.sequential import round_in_order
from tests.sweep.problem import CPU, Problem, problem


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem(scheme="W3A16g16", samples=24)


def rounded(case: Problem, chain: Chain, step: Gptq) -> Frozen:
    with torch.no_grad():
        moved = chain.moved()
    return round_in_order(
        case.blocks[0], *moved, chain.quantizer, step, case.context, case.hidden_NTD, batch_size=5, device=CPU
    )


def block_error(case: Problem, weights: dict[str, Tensor]) -> float:
    block = case.blocks[0]
    with torch.no_grad():
        return float(token_error(block(case.hidden_NTD, weights), block(case.hidden_NTD)))


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("opt", ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"]),
    ],
)
def test_linears_that_share_an_input(family: str, groups: list[str]) -> None:
    case = problem(family)
    found = shared_inputs(case.blocks[0], case.hidden_NTD[:1])
    assert [sorted(name.rpartition(".")[2] for name in names) for names in found] == [
        sorted(names.split()) for names in groups
    ]


class Listening(Gptq):
    """Keeps what it is given."""

    def codes(self, name: str, weight_OI: Tensor, hessian_II: Tensor, grid: Grid, context: Context) -> Any:
        heard[name] = hessian_II
        return super().codes(name, weight_OI, hessian_II, grid, context)


heard: dict[str, Tensor] = {}


def test_inputs_come_from_what_was_rounded_before(case: Problem) -> None:
    heard.clear()
    chain = case.chain(grid=Rtn())
    frozen = rounded(case, chain, Listening())
    weights, codes = frozen.weights, frozen.codes
    block = case.blocks[0]
    seen: list[Tensor] = []
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        handle = block.module.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.no_grad():
            block(case.hidden_NTD, weights)
        handle.remove()
        rows = seen[-1].flatten(0, 1)
        torch.testing.assert_close(heard[name], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    for name, weight in weights.items():
        assert torch.equal(weight, codes[name].dequantize(torch.float32))
    assert list(codes) == list(block.linears)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_block_is_nearer_than_by_rounding_alone(case: Problem, act_order: bool) -> None:
    chain = case.chain(grid=Rtn())
    alone = block_error(case, chain.freeze().weights)
    assert block_error(case, rounded(case, chain, Gptq(act_order=act_order)).weights) < 0.8 * alone


def test_it_rounds_what_was_learned_within_the_learned_ranges(case: Problem) -> None:
    chain = case.chain(Sde(band=8), grid=Lwc())
    case.fit(chain, steps=30).run()
    learned, fed = chain.freeze(), rounded(case, chain, Gptq())
    rows = case.hidden_NTD.flatten(0, 1)
    with torch.no_grad():
        norm = case.blocks[0].module.get_submodule("input_layernorm")
        moved = chain.moved()[0]["self_attn.q_proj"]
        fed_error, error = (
            float((norm(rows) @ (found["self_attn.q_proj"] - moved).T).norm())
            for found in (fed.weights, learned.weights)
        )
    assert fed_error < 0.9 * error
    for name, tensor in fed.codes.items():
        assert torch.equal(tensor.scale_OG, learned.codes[name].scale_OG)
        assert tensor.zero_OG is not None and torch.equal(tensor.zero_OG, learned.codes[name].zero_OG)  # pyright: ignore[reportArgumentType]


def test_a_linear_that_no_token_reaches_is_rounded_to_nearest() -> None:
    """As an expert may be that the router never picks; GPTQ would take its inputs for zeros."""
    case = problem(scheme="W3A16g16", samples=4)
    block = case.blocks[0]
    block.module.register_module("idle", nn.Linear(32, 16, bias=False))
    idle = replace(block, linears=(*block.linears, "idle"))
    case = replace(case, blocks=(idle,))
    chain = case.chain(grid=Rtn())
    weights = rounded(case, chain, Gptq()).weights
    torch.testing.assert_close(weights["idle"], chain.freeze().weights["idle"])
    assert not torch.equal(weights["mlp.down_proj"], chain.freeze().weights["mlp.down_proj"])
    assert shared_inputs(idle, case.hidden_NTD[:1])[-1] == ["idle"]
    moments = Moments(idle, {}, case.hidden_NTD, 2, torch.device("cpu"))
    assert torch.equal(moments.moment("idle"), torch.eye(32)), "as clip asks, whose weights have other names"
    assert torch.equal(moments.square("idle"), torch.ones(32))


def test_what_a_block_does_after_the_last_linear_asked_for_is_left_out(case: Problem) -> None:
    calls: list[int] = []
    handle = case.blocks[0].module.get_submodule("mlp.up_proj").register_forward_pre_hook(lambda *_: calls.append(1))
    weights = {name: weight_OI.float() for name, weight_OI in case.blocks[0].state().items()}
    alone, all_of_them = (Moments(case.blocks[0], weights, case.hidden_NTD, 5, CPU) for _ in range(2))
    alone.gather([["self_attn.o_proj"]])
    assert not calls
    first = all_of_them.moment("self_attn.o_proj")
    torch.testing.assert_close(all_of_them.square("self_attn.o_proj"), first.diagonal())
    handle.remove()
    assert len(calls) > 0 and torch.equal(alone.moment("self_attn.o_proj"), first)


def test_damping_that_had_to_grow_is_reported(case: Problem) -> None:
    """An estimate of moments may have a negative eigenvalue: -0.04 here, where the mean of the diagonal is 0.74."""
    state = {"w": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}
    grid, step = Rtn().build(state, case.context), Gptq()
    block_II = torch.eye(4) - 0.26 * torch.ones(4, 4)
    quantized, report = step.codes("w", state["w"], torch.block_diag(*4 * [block_II]), grid, case.context)
    assert report == {"damp.w": pytest.approx(0.1)} and quantized.codes_OI.shape == (3, 16)
    assert step.codes("w", state["w"], torch.eye(16), grid, case.context)[1] == {}
    with pytest.raises(UserError, match="gptq: the inputs' products have no inverse for w: give more or other"):
        step.codes("w", state["w"], torch.block_diag(*4 * [block_II - torch.eye(4) * 0.5]), grid, case.context)
