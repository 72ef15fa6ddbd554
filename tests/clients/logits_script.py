"""Runs where transformers is installed: how far the logits of two folders of one model lie apart.

    python logits_script.py FOLDER DENSE

FOLDER is a compressed-tensors folder. Where it stores int8 and rounds activations, the dense model gets these weights,
which 16 bits would round, and rounds what enters its linears. Prints one JSON object. T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TEXT = (
    "The lighthouse keeper counted 17 ships before noon, wrote them down in blue ink, and wondered - as on every day "
    "since the storm - whether the eighteenth would come. def area(radius): return 3.14159 * radius ** 2"
)


def round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round what enters a linear token by token, as compressed-tensors does to 8 symmetric bits."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / (255 / 2)
    return ((inputs[0] / scale).round().clamp(-128, 127) * scale, *inputs[1:])


def as_int8(model: nn.Module, folder: Path) -> None:
    """Give a dense model the int8 weights of a folder, and inputs rounded to 8 bits."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight_scale" in stored:
            module.weight.copy_(stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float())
            module.register_forward_pre_hook(round_input)


@torch.no_grad()
def logits(folder: Path, int8: Path | None = None) -> Tensor:
    """Return the logits [T, V] over the text in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if int8 is not None:
        as_int8(model, int8)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    return model(tokens).logits[0].float()


def main() -> None:
    """Compare and print."""
    folder, dense = map(Path, sys.argv[1:])
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    found_TV = logits(folder)
    dense_TV = logits(dense, folder if quantization["format"] == "int-quantized" else None)
    away = float((found_TV - dense_TV).abs().max())
    print(json.dumps({"away": away, "largest": float(dense_TV.abs().max()), "tokens": len(dense_TV)}))


if __name__ == "__main__":
    main()
