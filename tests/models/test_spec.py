"""Every family's spec is proved on a tiny random model in float64, and a wrong spec is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from makeweight.errors import UserError
from makeweight.models.registry import all_specs, generic_spec, spec_for
from makeweight.models.rescale import qk_free, rescale_qk
from makeweight.models.spec import Edge
from makeweight.models.validate import SpecError, validate
from tests.tiny import FAMILIES, tiny_model

SPECIFIED = [family for family in FAMILIES if family != "gpt-neox"]


@pytest.mark.parametrize("family", SPECIFIED)
def test_every_edge_is_exact(family: str) -> None:
    model = tiny_model(family)
    spec = spec_for(model.config)
    assert spec.edges
    validate(spec, model)


@pytest.mark.parametrize("family", SPECIFIED)
def test_a_wrong_edge_is_caught(family: str) -> None:
    model = tiny_model(family)
    spec = spec_for(model.config)
    for edge in spec.edges:
        if edge.src in spec.norms and len(edge.dst) > 1:
            short = replace(edge, dst=edge.dst[:-1])
            wrong = replace(spec, edges=tuple(short if item is edge else item for item in spec.edges))
            with pytest.raises(SpecError, match=r"changes the model's logits|no edge mentions"):
                validate(wrong, model)
    block = model.get_submodule(f"{spec.blocks}.0")
    reader = next(name for name, item in block.named_modules() if getattr(item, "in_features", 0) == 64)
    residual = Edge(src=spec.residual_writers[0], dst=(reader,))
    with pytest.raises(SpecError, match="changes the model's logits"):
        validate(replace(spec, edges=(*spec.edges, residual)), model)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"norm_offset": 0.0}),
        ("qwen3", {"qk": ("self_attn.q_proj", "self_attn.k_proj")}),
        ("llama", {"rotary": False}),
        ("llama", {"heads": None}),
        ("opt-gelu", {"edges": (Edge(src="fc1", dst=("fc2",)),)}),
    ],
)
def test_a_wrong_fact_is_caught(family: str, change: dict[str, object]) -> None:
    model = tiny_model(family)
    with pytest.raises((SpecError, RuntimeError)):
        validate(replace(spec_for(model.config), **change), model)  # type: ignore[arg-type]


def test_a_forgotten_linear_is_caught() -> None:
    model = tiny_model("llama")
    spec = spec_for(model.config)
    with pytest.raises(SpecError, match="no edge mentions the linear"):
        validate(replace(spec, edges=spec.edges[:2], residual_writers=("self_attn.o_proj",)), model)


def test_a_wrong_path_is_caught() -> None:
    model = tiny_model("llama")
    with pytest.raises(SpecError, match=r"no module model\.nor"):
        validate(replace(spec_for(model.config), final_norm="model.nor"), model)


def test_families_are_discovered() -> None:
    names = {spec.family for spec in all_specs()}
    assert {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "opt-post-norm", "phi3"} <= names
    tried = {spec_for(tiny_model(family).config).family for family in FAMILIES}
    assert names <= tried, "a family has no tiny configuration, so that no test proves its edges"


def test_other_families_get_a_spec_without_edges() -> None:
    spec = spec_for(tiny_model("gpt-neox").config)
    assert (spec.family, spec.blocks, spec.edges) == ("generic", "gpt_neox.layers", ())
    assert (spec.embedding, spec.head) == ("gpt_neox.embed_in", "lm_head")
    validate(spec, tiny_model("gpt-neox"))


def test_blocks_without_linears_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match=r"no nn\.Linear in its blocks .*Conv1D"):
        spec_for(GPT2Config(n_embd=32, n_layer=2, n_head=2))


def test_experts_in_flat_matrices_are_refused() -> None:
    """As DBRX keeps them."""
    model = tiny_model("gpt-neox")
    for block in model.get_submodule("gpt_neox.layers").children():
        block.register_parameter("experts", torch.nn.Parameter(torch.zeros(64, 64)))
    assert generic_spec(model).blocks == "gpt_neox.layers", "a few weights outside of linears are no obstacle"
    for block in model.get_submodule("gpt_neox.layers").children():
        block.register_parameter("experts", torch.nn.Parameter(torch.zeros(64, 64 * 64)))
    with pytest.raises(UserError, match=r"keeps most weights of a block outside of linear layers \(experts"):
        generic_spec(model)


def test_experts_are_refused() -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    with pytest.raises(UserError, match="mixture of experts"):
        spec_for(config)


def test_multimodal_models_are_refused() -> None:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    with pytest.raises(UserError, match="more than text"):
        spec_for(Gemma3Config(text_config=Gemma3TextConfig(), vision_config=SiglipVisionConfig()))


@pytest.mark.parametrize("family", ["llama", "phi3-partial", "opt"])
def test_rescaling_is_differentiable(family: str) -> None:
    model = tiny_model(family)
    spec = spec_for(model.config)
    scale = torch.ones(*qk_free(spec, model.config), requires_grad=True)
    state = dict(model.get_submodule(spec.blocks)[0].state_dict())  # type: ignore[index]
    out = rescale_qk(state, spec, model.config, scale)
    sum(tensor.square().sum() for tensor in out.values()).backward()  # type: ignore[union-attr]
    assert scale.grad is not None
    assert bool((scale.grad != 0).all())
