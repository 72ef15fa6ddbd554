"""Tiny random models of every family, with a byte-level tokenizer: no download, milliseconds on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
_GEMMA: dict[str, Any] = {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_OPT: dict[str, Any] = {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GATED, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_GATED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_GATED, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_GATED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 32}),
    "gemma": ("gemma", {**_GATED, "head_dim": 16}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-gelu": ("opt", {**_OPT, "activation_function": "gelu"}),
    "phi3": ("phi3", _GATED),
    "phi3-partial": ("phi3", {**_GATED, "partial_rotary_factor": 0.5}),
    "gpt-neox": ("gpt_neox", {**_COMMON, "intermediate_size": 128}),
}
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""Names for `tiny_model`; every one but gpt-neox, which stands for families without a spec, has edges."""


def tiny_model(family: str, *, layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a random causal model of a family; norms and biases are random too, so that an omission shows."""
    kind, values = _CONFIGS[family]
    values = {**values, "num_hidden_layers": layers}
    if "layer_types" in values:
        values["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 3.0 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.ndim == 2 else parameter + noise)
    model.config.use_cache = False
    return model.to(dtype).eval()


def tiny_folder(
    family: str,
    path: Path,
    *,
    tokenizer: bool = True,
    layers: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> Path:
    """Save `tiny_model(family)` as a Hugging Face folder and return its path."""
    model = tiny_model(family, layers=layers, seed=seed, dtype=dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the 256 bytes plus <s>, </s> and <pad>, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    return tokenizer
