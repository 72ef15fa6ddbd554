"""ONNX Runtime computes with a whole exported model what the solved one computes, also token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from makeweight.export.onnx import DATA, MODEL, Onnx, Written
from makeweight.export.run import _compare, export_model
from makeweight.export.solved import Solved
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval
from tests.export.test_onnx import session
from tests.runs import a_text, our_logits, small
from tests.tiny import VOCABULARY, tiny_folder

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]
Arrays = dict[str, np.ndarray]


def solve(
    family: str, root: Path, scheme: str = "W4A16g32", *, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Return a tiny model solved by rounding to nearest; `root` holds it."""
    model, text = tiny_folder(family, root / "model", dtype=dtype), a_text(root / "text.txt")
    values = {"method": "rtn", "scheme": Scheme.parse(scheme), "eval": Eval(datasets=()), **changes}
    quantize(small(model, root / "solved", text, **values))
    return root / "solved"


def step(
    run: onnxruntime.InferenceSession, tokens_BS: np.ndarray, past: Arrays | None = None
) -> tuple[np.ndarray, Arrays]:
    """Return logits, and the keys and values to give with the next tokens."""
    states = [item for item in run.get_inputs() if item.name.startswith("past_key_values")]
    nothing = {item.name: np.zeros((len(tokens_BS), item.shape[1], 0, item.shape[3]), np.float32) for item in states}
    held = past or nothing
    earlier = next(iter(held.values())).shape[2]
    mask = np.ones((len(tokens_BS), earlier + tokens_BS.shape[1]), np.int64)
    logits, *new = map(np.asarray, run.run(None, {"input_ids": tokens_BS, "attention_mask": mask, **held}))
    names = [item.name.replace("present", "past_key_values") for item in run.get_outputs()]
    return logits, dict(zip(names[1:], new, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(family: str, tmp_path: Path) -> None:
    solved = solve(family, tmp_path, dtype=torch.float32)
    (done,) = export_model(solved, ["onnx"], out=tmp_path)
    assert done.deviation == 0 and done.linears == 21
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 24), generator=generator)
    expected = our_logits(solved, tokens_BT).float().numpy()
    run = session(done.path / MODEL)
    near = 2e-5 * np.abs(expected).max()

    whole, _ = step(run, tokens_BT.numpy())
    assert whole.dtype == np.float32 and whole.shape == (2, 24, VOCABULARY)
    assert np.abs(whole - expected).max() < near

    first, past = step(run, tokens_BT[:1, :17].numpy())
    second, past = step(run, tokens_BT[:1, 17:18].numpy(), past)
    third, _ = step(run, tokens_BT[:1, 18:].numpy(), past)
    assert np.abs(np.concatenate([first, second, third], 1) - expected[:1]).max() < near


@torch.no_grad()
def exact_logits(solved: Path, tokens_BT: Tensor) -> np.ndarray:
    """Return what transformers computes in float64 with the values of a solved folder; norms ask for float32."""
    config = AutoConfig.for_model(**Solved(solved).config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for part in Solved(solved).parts():
        weights = {f"{name}.weight": tensor.dequantize(torch.float32) for name, tensor in part.quantized.items()}
        for name, tensor in {**part.kept, **weights}.items():
            model.get_parameter(name).copy_(tensor)
    return model(input_ids=tokens_BT).logits.numpy()


@pytest.mark.parametrize("scheme", ["W2A16g16", "W3A16g32", "W4A16_sym", "W5A16g64", "W8A16"])
def test_every_width(scheme: str, tmp_path: Path) -> None:
    """A model of bfloat16, whose kept tensors stay so in the file."""
    solved = solve("llama-tied", tmp_path, scheme)
    (done,) = export_model(solved, ["onnx"], out=tmp_path)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = exact_logits(solved, tokens_BT)
    logits, _ = step(session(done.path / MODEL), tokens_BT.numpy())
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()

    graph = onnx.load(done.path / MODEL, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    assert stored["model.embed_tokens.weight"].data_type == TensorProto.BFLOAT16
    assert "lm_head.weight" not in stored, "a tied head shares the embedding"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_rotary_positions(rope: dict[str, Any], tmp_path: Path) -> None:
    solved = solve("llama", tmp_path)
    config = json.loads((solved / "config.json").read_text())
    (solved / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 10000.0, **rope}}))
    (done,) = export_model(solved, ["onnx"], out=tmp_path)
    tokens_BT = torch.randint(0, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(2))
    expected = exact_logits(solved, tokens_BT)
    logits, _ = step(session(done.path / MODEL), tokens_BT.numpy())
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


def test_blocks_that_were_not_quantized(tmp_path: Path) -> None:
    """Their linears, which have biases here, multiply with the weights as they were."""
    solved = solve("llama-tied", tmp_path, blocks=(1, 2))
    (done,) = export_model(solved, ["onnx"], out=tmp_path)
    assert done.linears == 7
    tokens_BT = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
    expected = exact_logits(solved, tokens_BT)
    logits, _ = step(session(done.path / MODEL), tokens_BT.numpy())
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


def test_texts_of_two_lengths(tmp_path: Path) -> None:
    """The shorter one is filled up on its right, where the mask is 0."""
    solved = solve("qwen3", tmp_path, dtype=torch.float32)
    (done,) = export_model(solved, ["onnx"], out=tmp_path)
    run = session(done.path / MODEL)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(4)).numpy()
    expected, past = step(run, tokens_BT)
    states = {name: state[:, :, :0] for name, state in past.items()}
    mask = np.ones((2, 24), np.int64)
    mask[1, 15:] = 0
    (logits,) = map(np.asarray, run.run(["logits"], {"input_ids": tokens_BT, "attention_mask": mask, **states}))
    assert np.abs(logits[0] - expected[0]).max() < 1e-4 and np.abs(logits[1, :15] - expected[1, :15]).max() < 1e-4


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    solved = solve("qwen2", tmp_path)
    (done,) = export_model(solved, ["onnx"], out=tmp_path)
    config = json.loads((done.path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "quantization_config" not in config
    assert (done.path / "tokenizer.json").is_file() and not list(done.path.glob("*.safetensors"))
    graph = onnx.load(done.path / MODEL, load_external_data=False).graph
    for tensor in graph.initializer:
        if not tensor.name.startswith("/") or tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == DATA and int(entries["offset"]) % 4096 == 0
    assert (done.path / MODEL).stat().st_size < 100_000

    genai = json.loads((done.path / "genai_config.json").read_text())["model"]
    assert genai["type"] == "qwen2" and genai["decoder"]["filename"] == MODEL and genai["eos_token_id"] == 257
    inputs, outputs = ({item.name for item in items} for items in (graph.input, graph.output))
    named = {**genai["decoder"]["inputs"], **genai["decoder"]["outputs"]}
    assert inputs | outputs == {name % i if "%" in name else name for name in named.values() for i in range(3)}


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    """Every byte of codes, scales and zero-points is compared."""
    solved = Solved(solve("llama", tmp_path))
    (done,) = export_model(solved.path, ["onnx"], out=tmp_path)
    written = Written(done.path)
    name = solved.names[0]
    whole = (done.path / DATA).read_bytes()
    for stored in written.linears[name].input[1:]:
        entries = {
            entry.key: int(entry.value) for entry in written.tensors[stored].external_data if entry.key != "location"
        }
        place = entries["offset"] + entries["length"] - 1
        (done.path / DATA).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(RuntimeError, match=name):
            _compare(Onnx(), solved, done.path)
