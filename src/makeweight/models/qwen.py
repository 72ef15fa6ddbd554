"""Qwen2, Qwen2.5 (LLaMA's layout with biases on q, k, v) and Qwen3 (norms on q and k)."""

from dataclasses import replace

from makeweight.models import llama

QWEN2 = replace(
    llama.SPEC,
    family="qwen2",
    architectures=("Qwen2ForCausalLM",),
    notes="q, k and v carry biases, and k's are large: a row scale applies to them too.",
)
QWEN3 = replace(
    llama.SPEC,
    family="qwen3",
    architectures=("Qwen3ForCausalLM",),
    qk=None,
    notes="q_norm and k_norm follow q and k, so a row scale on either would be cancelled.",
)

SPECS = (QWEN2, QWEN3)
