"""Loads a GPTQ or AWQ folder with auto-round's kernels and the dense one without, and prints how far they differ.

Arguments: the packed folder, the dense folder. The last line is JSON; see `main`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

TEXT = "The capital of France is Paris, and the capital of Japan is Tokyo."
BACKENDS = {"gptq": "torch", "auto-round": "torch", "awq": "ark"}


def load_packed(folder: str) -> Any:
    """Load as a user would."""
    method = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=AutoRoundConfig(backend=BACKENDS[method]),
        dtype=torch.bfloat16,
        device_map="cpu",
    )


def distance(ours: Tensor, other: Tensor) -> float:
    """Return the length of the difference relative to the length of `other`."""
    return float((ours - other).norm() / other.norm())


@torch.no_grad()
def main(folder: str, dense_folder: str) -> dict[str, Any]:
    """Compare weights one by one, logits in bfloat16 as loaded, and logits with all arithmetic in float32."""
    ours, dense = load_packed(folder), AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.bfloat16)
    tokens = AutoTokenizer.from_pretrained(dense_folder)(TEXT, return_tensors="pt").input_ids
    loaded, expected = (model(tokens).logits.float() for model in (ours, dense))
    for model in (ours, dense):
        nn.Module.float(model)  # scales too: products are now exact
    ours32, dense32 = (model(tokens).logits for model in (ours, dense))
    linears = dict(dense.named_modules())
    kernels = {name: module for name, module in ours.named_modules() if type(module).__name__.startswith("QuantLinear")}
    unequal = 0
    for name, module in kernels.items():
        weight_IO = module(torch.eye(module.infeatures))
        unequal += int((weight_IO.T.bfloat16().float() != linears[name].weight).sum())
    return {
        "kernels": sorted({type(module).__module__ for module in kernels.values()}),
        "linears": len(kernels),
        "unequal": unequal,
        "bfloat16": distance(loaded, expected),
        "noise": distance(expected, dense32),
        "float32": distance(ours32, dense32),
        "same_top": float((loaded.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
