"""LLaMA 1-3, Vicuna, SmolLM and Mistral: rms norms, gated MLP, rotary positions, grouped queries."""

from makeweight.models.spec import Edge, ModelSpec

SPEC = ModelSpec(
    family="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    edges=(
        Edge(src="input_layernorm", dst=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge(src="self_attn.v_proj", dst=("self_attn.o_proj",)),
        Edge(src="post_attention_layernorm", dst=("mlp.gate_proj", "mlp.up_proj")),
        Edge(src="mlp.up_proj", dst=("mlp.down_proj",)),
    ),
    residual_writers=("self_attn.o_proj", "mlp.down_proj"),
    norms=("input_layernorm", "post_attention_layernorm"),
    heads=("self_attn.v_proj", "self_attn.o_proj"),
    qk=("self_attn.q_proj", "self_attn.k_proj"),
)

SPECS = (SPEC,)
