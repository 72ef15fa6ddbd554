"""What is packed comes back code by code, and ONNX Runtime computes with it what the solved model computes."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from makeweight.export.base import Facts
from makeweight.export.onnx import MODEL, Onnx, Written, block_of, pack, unpack_rows
from makeweight.export.onnx_graph import CODES, SCALES, ZEROS, Layout
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from tests.export.test_compressed_tensors import a_tensor

Packed = tuple[Layout, dict[str, Tensor]]


@st.composite
def tensors(draw: st.DrawFn) -> QTensor:
    group, count = draw(st.sampled_from([16, 32, 48, 64, 96, 128, 192, 256, 512])), draw(st.integers(1, 3))
    channel = draw(st.booleans())
    scheme = Scheme(bits=draw(st.integers(2, 8)), group_size=-1 if channel else group, symmetric=draw(st.booleans()))
    rows, seed = draw(st.integers(1, 9)), draw(st.integers(0, 99))
    return a_tensor(scheme, rows, group * count, scale_dtype=torch.bfloat16, seed=seed)


def by_hand(values: list[int], bits: int) -> list[int]:
    """Pack unsigned integers with Python's own, low bits first."""
    number = sum(value << place * bits for place, value in enumerate(values))
    return list(number.to_bytes(-(-len(values) * bits // 8), "little"))


def model_of(packed: Packed, **attributes: int) -> onnx.ModelProto:
    """Return a model of one MatMulNBits node, its tensors inside."""
    layout, parts = packed
    kinds = {CODES: TensorProto.UINT8, SCALES: TensorProto.FLOAT, ZEROS: TensorProto.UINT8}
    held = [
        helper.make_tensor(name, kinds[name], tuple(part.shape), part.numpy().tobytes(), raw=True)
        for name, part in parts.items()
    ]
    sizes = {"N": layout.outputs, "K": layout.inputs, "bits": layout.bits, "block_size": layout.block, **attributes}
    node = helper.make_node("MatMulNBits", ["x", *parts], ["y"], "linear", domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(key, value) for key, value in sizes.items())
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", layout.inputs), ("y", layout.outputs))
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "one", [x], [y], held), opset_imports=opsets, ir_version=10)


def session(model: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_codes_come_back(tensor: QTensor) -> None:
    layout, parts = pack(tensor)
    bits, block = layout.bits, layout.block
    height, width = tensor.codes_OI.shape
    groups, middle = tensor.scale_OG.shape[1], 1 << bits - 1
    assert bits in (2, 4, 8) and tensor.scheme.bits <= bits < 2 * max(tensor.scheme.bits, 2)
    assert block in (16, 32, 64, 128, 256) and (width // groups) % block == 0
    assert parts.keys() == {CODES, SCALES} | (set() if tensor.scheme.symmetric else {ZEROS})

    assert parts[CODES].dtype == torch.uint8 and parts[CODES].shape == (height, width // block, block * bits // 8)
    assert parts[CODES].flatten(1).tolist() == [by_hand(row, bits) for row in (tensor.codes_OI.int() + middle).tolist()]
    repeats = width // groups // block
    assert torch.equal(parts[SCALES], tensor.scale_OG.float().repeat_interleave(repeats, 1))
    if tensor.zero_OG is not None:
        rows = (tensor.zero_OG.int().repeat_interleave(repeats, 1) + middle).tolist()
        assert parts[ZEROS].tolist() == [by_hand(row, bits) for row in rows]
    codes_OI = unpack_rows(parts[CODES].flatten(1).numpy(), bits, width)
    assert np.array_equal(codes_OI.astype(int) - middle, tensor.codes_OI.numpy())


@pytest.mark.parametrize("group", [16, 64, 96, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_runtime_multiplies_with_them(bits: int, symmetric: bool, group: int, tmp_path: Path) -> None:
    """In float32 by default; `accuracy_level` 4 rounds the inputs to 8 bits, block by block."""
    tensor = a_tensor(Scheme(bits=bits, group_size=group, symmetric=symmetric), 48, 768, scale_dtype=torch.bfloat16)
    model = model_of(pack(tensor))
    onnx.save(model, tmp_path / MODEL)
    weight_OI = tensor.dequantize(torch.float32)
    (node,) = Written(tmp_path).linears.values()
    assert torch.equal(Written(tmp_path).weight(node), weight_OI)

    for rows in (1, 7):
        x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows))
        expected = (x.double() @ weight_OI.double().T).numpy()
        for level, tolerance in ((0, 2e-6), (4, 2e-2)):
            (y,) = session(model_of(pack(tensor), accuracy_level=level)).run(None, {"x": x.numpy()})
            assert np.abs(y - expected).max() <= tolerance * np.abs(expected).max()


def facts(scheme: str = "W4A16g32", width: int = 192, **changes: Any) -> Facts:
    base = Facts(scheme=Scheme.parse(scheme), architecture="LlamaForCausalLM", shapes={"model.layers.0.x": (8, width)})
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (facts(architecture="Gemma2ForCausalLM"), "Gemma2ForCausalLM is none of LlamaForCausalLM, Mistral"),
        (facts("W8A8"), "does not round what enters a linear"),
        (facts("W4A16g24"), "model.layers.0.x has groups of 24 inputs"),
        (facts("W4A16", width=200), "model.layers.0.x has groups of 200 inputs"),
        (facts(shapes={"layers.0.x": (8, 192)}), r"without a prefix \(layers\.0\.x\), save it once with"),
        (facts(config={"model_type": "llama", "hidden_act": "gelu"}), "has the activation gelu"),
        (
            facts(config={"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            r"its rotary positions \(dynamic\) change",
        ),
        (facts(config={"model_type": "qwen3", "head_dim": 24}), "heads have 24 channels"),
    ],
)
def test_refusals(given: Facts, said: str) -> None:
    reason = Onnx().refusal(given)
    assert reason is not None and re.search(said, reason) and not reason.endswith(".")


def test_what_is_held() -> None:
    for scheme in ("W2A16g16", "W3A16g48_sym", "W4A16", "W8A16g96", "W7A16g64"):
        assert Onnx().refusal(facts(scheme, config={"model_type": "llama"})) is None
    assert [block_of(group) for group in (16, 48, 64, 96, 192, 256, 512, 576, 768, 8)] == [
        *(16, 16, 64, 32, 64, 256, 128, 64, 128, None)
    ]


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "run `pip install onnx`" in str(Onnx().refusal(facts()))
