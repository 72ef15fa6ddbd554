"""Runs where llm-compressor is installed: its GPTQ or its AWQ, saved as dequantized weights.

    python llm_compressor_script.py JOB.json

The options hold the "method", `gptq` or `awq`; all else is an argument of that modifier. Saved are the weights after
its own quantization and dequantization, the values that its compressed folder stands for.
"""

from __future__ import annotations

from typing import Any

import handover
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(job: dict[str, Any]) -> list[Modifier]:
    """Return the modifiers: every linear but the head, one scale per group or per channel, integer zero-points."""
    options = dict(job["options"])
    method = options.pop("method")
    size = job["group_size"]
    grouping: dict[str, Any] = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    weights = QuantizationArgs(num_bits=job["bits"], type="int", symmetric=False, **grouping)
    where: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        return [GPTQModifier(**where, **options)]
    return [AWQModifier(**options), QuantizationModifier(**where)]


@torch.no_grad()
def quantize(job: dict[str, Any]) -> None:
    """Write the folder OUT/dense; the samples are a data set of token ids, in their order."""
    if not torch.accelerator.is_available():
        # AWQ pins what it keeps for an accelerator, and torch refuses where there is none.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    tokens_NT = load_file(job["tokens"])["tokens"]
    samples, length = tokens_NT.shape
    columns = {"input_ids": tokens_NT.tolist(), "attention_mask": torch.ones_like(tokens_NT).tolist()}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=handover.dtype(job))
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        dataset=Dataset.from_dict(columns),
        recipe=recipe(job),
        num_calibration_samples=samples,
        max_seq_length=length,
        shuffle_calibration_samples=False,
    )
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            scale, zero = module.weight_scale, module.weight_zero_point
            module.weight.data = fake_quantize(module.weight, scale, zero, scheme.weights)
    handover.save(model, job)


def main() -> None:
    """Quantize, and say with what."""
    job = handover.read_job()
    quantize(job)
    handover.answer(job, "llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    main()
