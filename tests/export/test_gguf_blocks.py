"""Blocks decode by hand to what was solved, none is larger than it must be, and what fits none is refused."""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from makeweight.export.base import Facts, deviation
from makeweight.export.gguf import Gguf
from makeweight.export.gguf_blocks import BLOCKS, Block, block_for, pack, rounding
from makeweight.export.gguf_file import Stored, decode
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme


def facts_of(scheme: Scheme | str, width: int = 512, **changes: Any) -> Facts:
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    facts = Facts(scheme=parsed, architecture="LlamaForCausalLM", shapes={"up": (8, width)})
    return replace(facts, **changes)


def a_tensor(scheme: Scheme, rows: int, width: int, zeros: tuple[int, int], seed: int) -> QTensor:
    """Return random codes of the whole range and zero-points of a part of it, both ends of both included."""
    generator = torch.Generator().manual_seed(seed)
    groups = width // scheme.group_of(width, "w")

    def integers(low: int, high: int, *shape: int) -> Tensor:
        drawn = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
        drawn[0, 0], drawn[-1, -1] = low, high
        return drawn

    return QTensor(
        codes_OI=integers(scheme.qmin, scheme.qmax, rows, width),
        scale_OG=(torch.rand(rows, groups, generator=generator) + 0.01).half(),
        zero_OG=None if scheme.symmetric else integers(*zeros, rows, groups),
        scheme=scheme,
    )


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def by_hand(name: str, b: bytes) -> list[float]:
    """Decode one block with Python's numbers."""
    if name == "Q8_0":
        return [half(b[:2]) * code for code in struct.unpack("32b", b[2:])]
    if name == "Q2_0":
        return [half(b[:2]) * ((b[2 + i // 4] >> i % 4 * 2) % 4 - 1) for i in range(64)]
    if name == "Q3_K":
        highest, lower, scales, d = b[:32], b[32:96], b[96:108], half(b[108:])
        values = []
        for i in range(256):
            part = i // 16
            scale = scales[part % 8] >> 4 * (part // 8) & 15 | (scales[8 + part % 4] >> 2 * (part // 4) & 3) << 4
            low = lower[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
            high = highest[i % 32] >> i // 32 & 1
            values.append(d * (scale - 32) * (low + 4 * high - 4))
        return values
    head = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6}[name]
    codes = [b[head + i % 16] >> 4 * (i // 16) & 15 for i in range(32)]
    if name == "Q4_0":
        return [half(b[:2]) * (code - 8) for code in codes]
    if name == "Q4_1":
        return [half(b[:2]) * code + half(b[2:4]) for code in codes]
    fifth = int.from_bytes(b[2:6], "little")
    return [half(b[:2]) * (code + 16 * (fifth >> i & 1) - 16) for i, code in enumerate(codes)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[QTensor, Facts]:
    """Tensors of all schemes, among them many with few zero-points, for which smaller blocks are enough."""
    group = draw(st.sampled_from([16, 32, 48, 64, 96, 128, 256, -1]))
    width = draw(st.sampled_from([32, 64, 96, 256, 320])) if group == -1 else group * draw(st.integers(1, 4))
    scheme = Scheme(bits=draw(st.integers(2, 8)), group_size=group, symmetric=draw(st.booleans()))
    ends = st.one_of(st.integers(scheme.qmin, scheme.qmax), st.sampled_from([-1, 0]))
    zeros = (min(pair := [draw(ends), draw(ends)]), max(pair))
    tensor = a_tensor(scheme, draw(st.integers(2, 5)), width, zeros, draw(st.integers(0, 99)))
    facts = facts_of(scheme, shapes={"w": tuple(tensor.codes_OI.shape)}, zeros=None if scheme.symmetric else zeros)
    return tensor, facts


@settings(max_examples=400, deadline=None)
@given(cases())
def test_blocks_stand_for_what_was_solved(case: tuple[QTensor, Facts]) -> None:
    tensor, facts = case
    block, scheme, width = block_for(facts), facts.scheme, tensor.codes_OI.shape[1]
    if isinstance(block, str):
        wide = scheme.bits == 8 and not scheme.symmetric
        assert wide or scheme.group_of(width, "w") % 32
        assert Gguf().refusal(facts) == block
        return
    packed = pack(tensor, block)
    assert packed.shape == (len(tensor.codes_OI), width // block.size * block.nbytes) and packed.dtype == np.uint8
    expected = tensor.dequantize(torch.float32)
    stored = Stored(kind=block.kind, shape=tuple(tensor.codes_OI.shape), data=packed.ravel())
    raw = packed.tobytes()
    chunks = [raw[start : start + block.nbytes] for start in range(0, len(raw), block.nbytes)]
    found = torch.tensor([value for chunk in chunks for value in by_hand(block.name, chunk)], dtype=torch.float64)
    off = deviation(decode(stored), tensor)
    if block.offset:
        assert off <= rounding(facts) <= 15 / 2048
        assert torch.allclose(found.view_as(expected).float(), decode(stored), rtol=0, atol=1e-6)
    else:
        assert off == 0 == rounding(facts)
        assert torch.equal(found.view_as(expected).float(), expected)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_smaller_block_is_exact(case: tuple[QTensor, Facts]) -> None:
    """Every smaller block lacks a level that one of the codes needs, whichever sign its scale has."""
    tensor, facts = case
    chosen = block_for(facts)
    if isinstance(chosen, str):
        return
    group = facts.scheme.group_of(tensor.codes_OI.shape[1], "w")
    for block in BLOCKS[: BLOCKS.index(chosen)]:
        if block.offset or group % block.size:
            continue
        levels = set(range(block.low, block.high + 1))
        zeros = range((facts.zeros or (0, 0))[0], (facts.zeros or (0, 0))[1] + 1)
        codes = range(facts.scheme.qmin, facts.scheme.qmax + 1)
        needed = [{code - zero for code in codes} for zero in zeros]
        assert any(not need <= levels and not {-level for level in need} <= levels for need in needed)


@pytest.mark.parametrize(
    ("scheme", "width", "zeros", "name"),
    [
        ("W2A16g64_sym", 576, None, "Q2_0"),
        ("W2A16_sym", 576, None, "Q2_0"),
        ("W2A16g32_sym", 576, None, "Q4_0"),
        ("W2A16g64", 576, None, "Q4_0"),
        ("W2A16g64", 576, (-1, 0), "Q2_0"),
        ("W2A16g64", 576, (-1, 1), "Q4_0"),
        ("W3A16g64_sym", 576, None, "Q4_0"),
        ("W3A16g64", 576, None, "Q4_0"),
        ("W3A16_sym", 576, None, "Q4_0"),
        ("W3A16_sym", 768, None, "Q3_K"),
        ("W3A16g256_sym", 512, None, "Q3_K"),
        ("W2A16g256", 512, None, "Q3_K"),
        ("W4A16g64_sym", 576, None, "Q4_0"),
        ("W4A16", 576, None, "Q4_1"),
        ("W4A16g64", 576, (0, 0), "Q4_0"),
        ("W5A16g32_sym", 576, None, "Q5_0"),
        ("W5A16g32", 576, None, "Q8_0"),
        ("W6A16g32_sym", 576, None, "Q8_0"),
        ("W7A16g32", 576, None, "Q8_0"),
        ("W8A16g64_sym", 576, None, "Q8_0"),
        ("W8A8", 576, None, "Q8_0"),
    ],
)
def test_which_block(scheme: str, width: int, zeros: tuple[int, int] | None, name: str) -> None:
    block = block_for(facts_of(scheme, width, zeros=zeros))
    assert isinstance(block, Block) and block.name == name


@pytest.mark.parametrize(
    ("facts", "clause"),
    [
        (facts_of("W8A16g64"), "Q8_0 holds symmetric ones and those of up to 7 bits"),
        (facts_of("W4A16g48", 96), "groups of 32, 64 or 128 would be"),
        (facts_of("W4A16g16"), "groups of 32, 64 or 128 would be"),
        (facts_of("W4A16", 80), "up has 80 inputs"),
        (facts_of("W4A16g64", fp16_scales=False), "--scale-dtype float16"),
        (facts_of("W4A16g64", architecture="Gemma2ForCausalLM"), "not among LlamaForCausalLM, Mistral"),
        (facts_of("W4A16g64", config={"model_type": "llama", "hidden_act": "gelu"}), "activation is gelu"),
        (
            facts_of(
                "W4A16g64", config={"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
            ),
            "rotary positions are of type dynamic",
        ),
        (facts_of("W4A16g64", config={"model_type": "llama"}, folder=Path("/nowhere")), "no tokenizer.json"),
    ],
)
def test_refusals(facts: Facts, clause: str) -> None:
    reason = Gguf().refusal(facts)
    assert reason is not None and clause in reason
    assert reason[0].islower() or reason.startswith(facts.architecture)
    assert not reason.endswith(".")


def test_the_gguf_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in (Gguf().refusal(facts_of("W4A16g64_sym")) or "")
