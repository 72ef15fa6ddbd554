"""AWQ folders hold the codes that were solved: against packing by hand, against the formula, and as whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makeweight.export.awq import Awq, pack, unpack
from makeweight.export.base import Facts
from makeweight.export.run import export_model
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from tests.export.test_compressed_tensors import a_tensor
from tests.export.test_gptq import a_solved_folder
from tests.runs import tensors


@st.composite
def a_case(draw: st.DrawFn) -> QTensor:
    """A matrix of any width, with a multiple of 8 outputs."""
    size = draw(st.sampled_from((-1, 16, 32, 48, 64)))
    width = draw(st.integers(1, 3)) * (size if size > 0 else draw(st.integers(1, 70)))
    scheme = Scheme(bits=4, group_size=size, symmetric=draw(st.booleans()))
    rows = 8 * draw(st.integers(1, 6))
    return a_tensor(scheme, rows, width, scale_dtype=torch.float16, seed=draw(st.integers(0, 99)))


def by_hand(rows: list[list[int]]) -> list[list[int]]:
    """Pack rows of outputs with Python's integers: eight to a word, the even ones below the odd ones."""
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), 8):
            eight = row[start : start + 8]
            word = sum(value << 4 * nibble for nibble, value in enumerate(eight[0::2] + eight[1::2]))
            words.append(word - (1 << 32) if word >> 31 else word)
        packed.append(words)
    return packed


@settings(max_examples=120, deadline=None)
@given(a_case())
def test_codes_come_back(tensor: QTensor) -> None:
    parts, (rows, width), groups = pack(tensor), tensor.codes_OI.shape, tensor.scale_OG.shape[1]
    assert parts.keys() == {"qweight", "qzeros", "scales"}
    assert all(part.is_contiguous() for part in parts.values())
    assert [part.dtype for part in parts.values()] == [torch.int32, torch.int32, torch.float16]
    assert [tuple(part.shape) for part in parts.values()] == [(width, rows // 8), (groups, rows // 8), (groups, rows)]
    assert parts["qweight"].tolist() == by_hand((tensor.codes_OI.T.int() + 8).tolist())
    signed_OG = torch.zeros(rows, groups) if tensor.zero_OG is None else tensor.zero_OG
    assert parts["qzeros"].tolist() == by_hand((signed_OG.T.int() + 8).tolist())
    assert torch.equal(unpack(parts), tensor.dequantize(torch.float32))


def test_a_word() -> None:
    """Outputs 0 to 7 with codes 0 to 7 read 0x75316420, and zero-points in the middle 0x88888888."""
    tensor = QTensor(
        codes_OI=torch.arange(-8, 0, dtype=torch.int8)[:, None].expand(8, 16),
        scale_OG=torch.ones(8, 1),
        zero_OG=None,
        scheme=Scheme(bits=4, group_size=16, symmetric=True),
    )
    parts = pack(tensor)
    assert set(parts["qweight"].flatten().tolist()) == {0x75316420}
    assert {word & 0xFFFFFFFF for word in parts["qzeros"].flatten().tolist()} == {0x88888888}


@pytest.mark.parametrize(
    ("scheme", "shape", "fp16", "words"),
    [
        ("W3A16g32", (64, 64), True, "4 bits, not 3"),
        ("W8A8", (64, 64), True, "4 bits, not 8"),
        ("W4A16g8", (64, 64), True, "groups of a multiple of 16 inputs, not 8"),
        ("W4A16", (60, 64), True, "a.b has 64 inputs and 60 outputs, not multiples of 1 and 8"),
        ("W4A16", (64, 64), False, "--scale-dtype float16"),
        ("W4A16_sym", (8, 50), True, None),
        ("W4A16g48", (8, 48), True, None),
    ],
)
def test_refusals(scheme: str, shape: tuple[int, int], fp16: bool, words: str | None) -> None:
    facts = Facts(scheme=Scheme.parse(scheme), architecture="A", shapes={"a.b": shape}, fp16_scales=fp16)
    reason = Awq().refusal(facts)
    assert reason is None if words is None else reason is not None and words in reason


@pytest.mark.parametrize("scheme", ["W4A16g32", "W4A16_sym"])
def test_a_model(tmp_path: Path, scheme: str) -> None:
    solved = a_solved_folder(tmp_path, scheme, "llama-tied")
    (done,) = export_model(solved.path, ["awq"], out=tmp_path)
    parts = list(solved.parts())
    kept = {name for part in parts for name in part.kept}
    assert (done.deviation, done.linears, done.kept) == (0.0, 21, len(kept))
    stored = tensors(done.path)
    for name, tensor in ((name, tensor) for part in parts for name, tensor in part.quantized.items()):
        own = {part: stored.pop(f"{name}.{part}") for part in Awq.parts}
        assert torch.equal(unpack(own), tensor.dequantize(torch.float32))
    assert stored.keys() == kept
    assert json.loads((done.path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": solved.scheme.group_size,
        "zero_point": True,
        "sym": False,
        "modules_to_not_convert": None,
    }


def test_what_was_left_alone_is_named(tmp_path: Path) -> None:
    solved = a_solved_folder(tmp_path, "W4A16g32")
    left = ("model.layers.1.mlp.up_proj", "lm_head")
    vars(solved).update(ignore=left, names=tuple(name for name in solved.names if name not in left))
    assert Awq().quantization_config(solved)["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj"]
    left = ("model.layers.1.fc1", "model.layers.1.fc2")  # of OPT: runtimes would find layers.1 in layers.10 as well
    vars(solved).update(ignore=left, names=("model.layers.10.fc1", "model.layers.10.fc2"))
    assert Awq().quantization_config(solved)["modules_to_not_convert"] == list(left)
