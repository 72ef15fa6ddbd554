"""OPT: layer norms, learned positions, ReLU; the 350m normalises after the residual sum.

A norm edge needs the norm's output to feed linears only and the norm to have weights; fc1 to fc2 needs an
activation with f(s x) = s f(x). What the configuration does not grant has no edge, and a
configuration that is none of these is no family of its own.
"""

from dataclasses import replace

from makeweight.models.spec import Edge, ModelSpec

_ATTENTION = Edge(src="self_attn_layer_norm", dst=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_VALUE = Edge(src="self_attn.v_proj", dst=("self_attn.out_proj",))
_MLP = Edge(src="final_layer_norm", dst=("fc1",))
_HIDDEN = Edge(src="fc1", dst=("fc2",))
_PRE_NORM = (("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True))
_RELU = (("activation_function", "relu"),)

OPT = ModelSpec(
    family="opt",
    architectures=("OPTForCausalLM",),
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    edges=(_ATTENTION, _VALUE, _MLP, _HIDDEN),
    residual_writers=("self_attn.out_proj", "fc2"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    heads=("self_attn.v_proj", "self_attn.out_proj"),
    qk=("self_attn.q_proj", "self_attn.k_proj"),
    rotary=False,
    norm="layer",
    requires=(*_PRE_NORM, *_RELU),
)
OPT_SMOOTH = replace(
    OPT,
    edges=(_ATTENTION, _VALUE, _MLP),
    requires=_PRE_NORM,
    notes="The activation is not ReLU: a scale does not pass from fc1 to fc2.",
)
OPT_POST_NORM = replace(
    OPT,
    family="opt-post-norm",
    final_norm=None,
    edges=(_VALUE, _HIDDEN),
    norms=(),
    requires=(("do_layer_norm_before", False), *_RELU),
    notes="The norms' output is the residual stream itself: nothing can be folded into or out of them.",
)

SPECS = (OPT, OPT_SMOOTH, OPT_POST_NORM)
