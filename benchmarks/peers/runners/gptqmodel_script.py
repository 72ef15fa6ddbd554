"""Runs where GPTQModel is installed: its GPTQ, saved as dequantized weights.

    python gptqmodel_script.py JOB.json

The options are arguments of `GPTQConfig`; all else is its default, so that columns are ordered within what a group
holds. Saved is what its plain torch kernel unpacks, the values that its packed folder stands for.
"""

from __future__ import annotations

import os
from typing import Any

import handover
import torch
from safetensors.torch import load_file
from torch import nn

# It counts half of the cores as workers when it is imported; where that is one, its loader, which asks for two, fails.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from gptqmodel import BACKEND, GPTQConfig, GPTQModel
from gptqmodel.quantization import FORMAT


@torch.no_grad()
def quantize(job: dict[str, Any]) -> None:
    """Write the folder OUT/dense; the samples are handed over one by one, with all of their tokens counted."""
    tokens_NT = load_file(job["tokens"])["tokens"]
    # Its first format stores zero-points less one, which leaves a grid without offsets one short.
    config = GPTQConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=False,
        format=FORMAT.GPTQ_V2,
        device="cpu",
        offload_to_disk=False,
        **job["options"],
    )
    engine = GPTQModel.load(job["model"], config, dtype=handover.dtype(job), backend=BACKEND.TORCH)
    samples = [{"input_ids": one_1T, "attention_mask": torch.ones_like(one_1T)} for one_1T in tokens_NT.split(1)]
    engine.quantize(samples, batch_size=1, backend=BACKEND.TORCH)
    unpack(engine.model)
    handover.save(engine.model, job)


def unpack(model: nn.Module) -> None:
    """Put linears with plain weights in the place of packed ones."""
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    for name, module in packed.items():
        weight_OI = module.dequantize_weight().T.contiguous()
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        model.set_submodule(name, linear)


def main() -> None:
    """Quantize, and say with what."""
    job = handover.read_job()
    quantize(job)
    handover.answer(job, "gptqmodel")


if __name__ == "__main__":
    main()
