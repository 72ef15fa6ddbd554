"""ONNX Runtime and onnxruntime-genai compute with an exported folder what transformers computes with its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from makeweight.export.solved import Solved
from tests.clients.conftest import Exporter, Tell
from tests.clients.environments import ask, python_with

PROMPT, COUNT = 32, 20
TEXT = (
    "The lighthouse stood on a narrow spit of rock, three miles from the nearest village. Every evening the keeper "
    "climbed the hundred and forty steps, trimmed the lamp and wrote the weather into a book: wind from the west, sea "
    "calm, one ship bound north. In winter nobody came for weeks. He read the same eleven books again and again, and "
    "learned to tell from the sound of the waves how high the tide was. When the engineers arrived to replace the lamp "
    "with an electric one, they found the book open on the table, filled to the last line, and the keeper asleep in "
    "his chair. They repaired the stairs, painted the door, tested the new light for two nights and left a machine "
    "that counted the ships by itself. It was never once wrong about the number, but it had no word for the color of "
    "the sea, and after a year the village asked whether somebody might go back to writing things down."
)


def in_float32(solved: Solved) -> PreTrainedModel:
    """Return the model of transformers with a solved folder's values, rounded to no other dtype."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**solved.config), dtype=torch.float32).eval()
    for part in solved.parts():
        weights = {f"{name}.weight": tensor.dequantize(torch.float32) for name, tensor in part.quantized.items()}
        for name, tensor in {**part.kept, **weights}.items():
            model.get_parameter(name).data.copy_(tensor)
    return model


def perplexity(logits_TV: Tensor, tokens_T: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:]).exp())


@pytest.mark.client
@pytest.mark.parametrize(
    ("scheme", "near", "near_dense"), [("W4A16g64", 1e-5, 5e-3), ("W2A16g64", 1e-3, 0.1), ("W8A16", 1e-5, 5e-3)]
)
@torch.no_grad()
def test_logits_and_text(
    scheme: str, near: float, near_dense: float, exported: Exporter, tmp_path: Path, tell: Tell
) -> None:
    """`near` is for logits, as a part of the largest, `near_dense` for perplexity against weights rounded to bfloat16.

    At 2 bits rounding to nearest leaves a model that magnifies every rounding: transformers in float32 and in float64
    differ by 4e-4 there, and rounding the weights to bfloat16 moves the perplexity by 4 %.
    """
    folder, dense = exported(scheme, "onnx"), exported(scheme, "dense")
    python = python_with("onnxruntime", ["onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "numpy==2.4.6"])
    tokens_T = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0]
    assert 180 <= len(tokens_T) <= 240
    (tmp_path / "tokens.json").write_text(json.dumps(tokens_T.tolist()))
    arguments = [str(folder), str(tmp_path / "tokens.json"), str(tmp_path / "logits.npy"), str(PROMPT), str(COUNT)]
    said = ask(python, Path(__file__).with_name("onnx_script.py"), *arguments)
    logits_TV = torch.from_numpy(np.load(tmp_path / "logits.npy"))

    exact: Any = in_float32(Solved(folder.parent / "solved"))
    expected_TV = exact(tokens_T[None]).logits[0]
    rounded_TV = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens_T[None]).logits[0]
    off = float((logits_TV - expected_TV).abs().max()) / float(expected_TV.abs().max())
    found, expected, rounded = (perplexity(each_TV, tokens_T) for each_TV in (logits_TV, expected_TV, rounded_TV))
    tell(f"onnxruntime {scheme}: logits off by {off:.2g} of the largest, perplexity {found:.4f}, ours {expected:.4f}")
    assert off < near
    assert found == pytest.approx(expected, rel=near) and found == pytest.approx(rounded, rel=near_dense)

    text = exact.generate(tokens_T[None, :PROMPT], max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
    assert said["greedy"] == said["genai"] == text[0, PROMPT:].tolist()
