"""Gemma 1-3, text only: norms store w - 1, every text begins with <bos>.

From Gemma 2 on each residual writer is followed by a norm.
"""

from dataclasses import replace

from makeweight.models import llama
from makeweight.models.spec import Edge

GEMMA = replace(llama.SPEC, family="gemma", architectures=("GemmaForCausalLM",), norm_offset=1.0, needs_start=True)
GEMMA2 = replace(
    GEMMA,
    family="gemma2",
    architectures=("Gemma2ForCausalLM",),
    edges=tuple(
        Edge(src="pre_feedforward_layernorm", dst=edge.dst) if edge.src == "post_attention_layernorm" else edge
        for edge in GEMMA.edges
    ),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    notes="post_attention_layernorm follows o_proj, not the residual: it feeds no linear.",
)
GEMMA3 = replace(
    GEMMA2,
    family="gemma3",
    architectures=("Gemma3ForCausalLM",),
    qk=None,
    notes="As Gemma 2, with q_norm and k_norm after q and k: a row scale on either would be cancelled.",
)

SPECS = (GEMMA, GEMMA2, GEMMA3)
