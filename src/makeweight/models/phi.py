"""Phi-3, Phi-3.5 and Phi-4: LLaMA's layout with q, k, v in one matrix and gate, up in another."""

from dataclasses import replace

from makeweight.models import llama
from makeweight.models.spec import Edge, Fused

PHI3 = replace(
    llama.SPEC,
    family="phi3",
    architectures=("Phi3ForCausalLM",),
    edges=(
        Edge(src="input_layernorm", dst=("self_attn.qkv_proj",)),
        Edge(src="self_attn.v_proj", dst=("self_attn.o_proj",)),
        Edge(src="post_attention_layernorm", dst=("mlp.gate_up_proj",)),
        Edge(src="mlp.up_proj", dst=("mlp.down_proj",)),
    ),
    fused=(
        Fused(
            linear="self_attn.qkv_proj",
            parts=(("self_attn.q_proj", "query"), ("self_attn.k_proj", "kv"), ("self_attn.v_proj", "kv")),
        ),
        Fused(linear="mlp.gate_up_proj", parts=(("mlp.gate_proj", "half"), ("mlp.up_proj", "half"))),
    ),
    notes="q_proj, k_proj, v_proj, gate_proj and up_proj name rows of qkv_proj and gate_up_proj.",
)

SPECS = (PHI3,)
