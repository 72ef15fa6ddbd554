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
BACKENDS = {"gptq": "torch", "awq": "ark"}


def load_packed(folder: str) -> Any:
    """Load as a user would; version 2 goes by the name that auto-round gives to true zero-points."""
    config = AutoConfig.from_pretrained(folder)
    found = config.quantization_config
    if found.get("checkpoint_format") == "gptq_v2":
        numbers = {name: found[name] for name in ("bits", "group_size", "sym")}
        config.quantization_config = {"quant_method": "auto-round", "packing_format": "auto_round", **numbers}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        quantization_config=AutoRoundConfig(backend=BACKENDS[found["quant_method"]]),
        dtype=torch.bfloat16,
        device_map="cpu",
    )


def rejected(folder: str) -> str:
    """Return what transformers says when config.json is taken as it stands; "" if it loads."""
    backend = BACKENDS[AutoConfig.from_pretrained(folder).quantization_config["quant_method"]]
    try:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=AutoRoundConfig(backend=backend))
    except NotImplementedError as error:
        return str(error)
    return ""


def distance(ours: Tensor, other: Tensor) -> float:
    """Return the length of the difference relative to the length of `other`."""
    return float((ours - other).norm() / other.norm())


@torch.no_grad()
def main(folder: str, dense_folder: str) -> dict[str, Any]:
    """Compare weights one by one, logits in bfloat16 as loaded, and logits with all arithmetic in float32."""
    refusal = rejected(folder)
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
        "refusal": refusal,
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
