"""Equivalent scaling: the block stays what it is, whatever the scales; what is searched with inputs loses less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from makeweight.methods.base import BlockStep, Params
from makeweight.methods.block.scale import TINY, Let, Scale, energy, into_down, lost, search
from makeweight.methods.grid.clip import Rtn
from makeweight.methods.grid.search import InputClip
from makeweight.methods.weight.sde import Sde
from makeweight.models.activations import inputs_rounded
from makeweight.models.registry import spec_for
from makeweight.models.rescale import per_reader, per_source
from makeweight.numerics.errors import token_error
from makeweight.numerics.scheme import Scheme
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Chain, Steps, join, split
from makeweight.sweep.inputs import Moments
from tests.sweep.problem import CPU, Problem, problem
from tests.tiny import FAMILIES, tiny_model

NORMS = {"llama": "input_layernorm", "opt": "self_attn_layer_norm"}
WITH_EDGES = [family for family in FAMILIES if family != "gpt-neox"]


def rest_of(block: Block) -> Params:
    """Return fp32 copies of a block's parameters besides the weights to quantize."""
    params = {name: tensor.detach().float().clone() for name, tensor in block.module.named_parameters()}
    return split(params, block.linears)[1]


def case_of(family: str, **options: object) -> Problem:
    case, model = problem(family, **options), tiny_model(family)  # pyright: ignore[reportArgumentType]
    return replace(case, context=replace(case.context, spec=spec_for(model.config, model), config=model.config))


def inputs_of(case: Problem, params: Params) -> Moments:
    return Moments(case.blocks[0], params, case.hidden_NTD, 4, CPU)


def chain_of(case: Problem, *exact: BlockStep, maps: tuple[Sde, ...] = ()) -> Chain:
    block, steps = case.blocks[0], Steps(exact=exact, maps=maps, grid=Rtn())
    return Chain.build(
        block.state(), steps, case.context, rest=rest_of(block), inputs=lambda params: inputs_of(case, params)
    )


def output(case: Problem, params: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return case.blocks[0](case.hidden_NTD, params)


def loss(case: Problem, params: dict[str, Tensor]) -> float:
    return float(token_error(output(case, params), output(case)))


@pytest.mark.parametrize("family", WITH_EDGES)
@pytest.mark.parametrize("step", [Let(down=True), Scale()], ids=["let", "scale"])
def test_scales_leave_the_block_as_it_is(family: str, step: BlockStep) -> None:
    case = case_of(family)
    chain = chain_of(case, step)
    with torch.no_grad():
        for group in chain.learnables():
            for parameter in group.params:
                parameter.normal_(std=0.5)
        moved = join(*chain.moved())
    changed = [name for name, tensor in join(case.blocks[0].state(), rest_of(case.blocks[0])).items()
               if not torch.equal(tensor, moved[name])]  # fmt: skip
    assert changed, "nothing was scaled"
    torch.testing.assert_close(output(case, moved), output(case), rtol=2e-4, atol=2e-4)


def test_let_is_the_identity_before_learning() -> None:
    case = case_of("llama")
    with_scales, without = chain_of(case, Let(down=True)), chain_of(case)
    for name, tensor in with_scales().items():
        assert torch.equal(tensor, {**without(), **rest_of(case.blocks[0])}[name])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_let_learns_what_outliers_need(family: str) -> None:
    """Alone, over plain rounding, at its own rate; one a hundred times smaller leaves 0.92 of the error or more.

    By the mean of four draws: three samples judge in each, of whose tokens few have most of the error.
    """
    case = case_of(family, samples=24)
    with torch.no_grad():
        case.blocks[0].module.get_submodule(NORMS[family]).weight[:4] *= 30  # pyright: ignore[reportIndexIssue, reportOperatorIssue]
    longer = replace(case, context=replace(case.context, steps=48))
    reports = [case.fit(chain_of(longer, Let()), steps=48, seed=seed).run() for seed in range(4)]
    assert all(report.best_step > 0 for report in reports)
    assert sum(report.error_after for report in reports) < 0.8 * sum(report.error_before for report in reports)


def test_norms_are_judged_as_they_are_stored() -> None:
    """In float32, too, though the file holds 16 bits."""
    case = case_of("llama")
    block, steps = case.blocks[0], Steps(exact=[Let()], grid=Rtn())
    chain = Chain.build(block.state(), steps, case.context, rest=rest_of(block), stored=torch.bfloat16)
    with torch.no_grad():
        for group in chain.learnables():
            for parameter in group.params:
                parameter.normal_(std=0.5)
    name = "input_layernorm.weight"
    judged, kept = chain()[name], chain.freeze().rest[name]
    assert judged.dtype == torch.float32 and judged.requires_grad
    assert torch.equal(judged, kept.bfloat16().float()) and not torch.equal(judged, kept)


def test_only_the_last_linear_of_the_mlp_is_left_out() -> None:
    for family in ("llama", "opt", "phi3", "gemma2"):
        spec = spec_for(tiny_model(family).config)
        left = [edge.dst[0].rpartition(".")[2] for edge in spec.edges if into_down(spec, edge)]
        assert left in (["down_proj"], ["fc2"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_searched_scales_are_the_best_of_all_exponents(family: str) -> None:
    case = case_of(family)
    block = case.blocks[0]
    params = join(block.state(), rest_of(block))
    inputs, spec = inputs_of(case, params), case.context.spec
    assert spec is not None
    for edge in spec.edges:
        scale_C = search(params, case.context, spec, edge, inputs)
        assert scale_C.min() > 0
        columns_I = per_reader(scale_C, spec, case.context.config, edge)

        def error(factors: Tensor, readers: tuple[str, ...] = edge.dst) -> float:
            found = [(params[f"{name}.weight"], inputs.moment(name)) for name in readers]
            return sum(float(lost(w, factors, moment, case.context) / energy(w, moment)) for w, moment in found)

        square_C = per_source(inputs.moment(edge.dst[0]).diagonal(), spec, case.context.config, edge)
        size_C = square_C.clamp(min=TINY).sqrt()  # relu leaves channels that are always zero
        powers = [size_C.pow(-step / 20) for step in range(20)]
        tried = [power_C * (1 / (power_C.max() * power_C.min()).sqrt()) for power_C in powers]
        found = [error(per_reader(scale_C, spec, case.context.config, edge)) for scale_C in tried]
        assert error(columns_I) == pytest.approx(min(found), rel=1e-5) and found[0] == error(torch.ones(1))


def test_inputs_with_a_few_large_channels_are_what_scales_are_for() -> None:
    case = case_of("llama", samples=24)
    norm = case.blocks[0].module.get_submodule("input_layernorm")
    with torch.no_grad():
        norm.weight[:4] *= 30  # pyright: ignore[reportIndexIssue, reportOperatorIssue]
    plain, scaled = chain_of(case), chain_of(case, Scale())
    assert loss(case, scaled()) < 0.8 * loss(case, plain())


def test_rounded_inputs_count_in_the_search() -> None:
    """With weights of 8 bits as well, what a token's one large channel costs the others is the larger part."""
    case = case_of("llama", samples=24, scheme="W8A8")
    norm = case.blocks[0].module.get_submodule("input_layernorm")
    with torch.no_grad():
        norm.weight[:2] *= 60  # pyright: ignore[reportIndexIssue, reportOperatorIssue]
    weights_alone = replace(case, context=replace(case.context, scheme=Scheme.parse("W8A16")))
    counted, not_counted = (chain_of(seen, Scale())() for seen in (case, weights_alone))
    exact = output(case)
    with inputs_rounded(case.blocks[0].module, case.blocks[0].linears, 8):
        ours, other = (float(token_error(output(case, params), exact)) for params in (counted, not_counted))
    assert ours < 0.8 * other


@pytest.mark.parametrize("scheme", ["W3A16g16", "W2A16", "W3A16g16_sym"])
def test_clip_costs_each_output_less_than_the_full_range(scheme: str) -> None:
    case = case_of("llama", samples=24, scheme=scheme)
    block = case.blocks[0]
    state, inputs = block.state(), inputs_of(case, join(block.state(), rest_of(block)))
    seen = replace(case.context, inputs=inputs)
    clipped, plain = InputClip().build(state, seen)(state), Rtn().build(state, seen)(state)

    def cost(found: dict[str, Tensor], name: str) -> float:
        """The error of a linear's output, from each group of inputs alone."""
        delta_OI, moment_II = found[name] - state[name], inputs.moment(name)
        size = case.context.scheme.group_of(state[name].shape[1], name)
        groups = range(0, delta_OI.shape[1], size)
        parts = [(delta_OI[:, i : i + size], moment_II[i : i + size, i : i + size]) for i in groups]
        return float(sum(((delta @ moment) * delta).sum() for delta, moment in parts))

    assert all(cost(clipped, name) <= cost(plain, name) * (1 + 1e-5) for name in state)
    assert sum(cost(clipped, name) for name in state) < 0.95 * sum(cost(plain, name) for name in state)
