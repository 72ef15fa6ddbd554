"""GPTQ folders hold the codes that were solved: against packing by hand, against the formula, and as whole models."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makeweight import __version__
from makeweight.errors import UserError
from makeweight.export.base import Facts, deviation
from makeweight.export.gptq import BITS, Gptq, GptqV1, pack, unpack
from makeweight.export.run import export_model
from makeweight.export.solved import Solved
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval
from tests.export.test_compressed_tensors import a_tensor
from tests.runs import a_text, small, tensors
from tests.tiny import tiny_folder


@st.composite
def a_case(draw: st.DrawFn) -> tuple[QTensor, int]:
    """A matrix and the version's offset; for version 1 every zero-point is at least 1."""
    less = draw(st.sampled_from((0, 1)))
    size = draw(st.sampled_from((-1, 16, 32, 48, 64, 96)))
    width = draw(st.integers(1, 3)) * (96 if size in (48, 96) else 64 if size == 64 else 32)
    scheme = Scheme(bits=draw(st.sampled_from(BITS)), group_size=size, symmetric=draw(st.booleans()))
    rows = 32 * draw(st.integers(1, 3))
    tensor = a_tensor(scheme, rows, width, scale_dtype=torch.float16, seed=draw(st.integers(0, 99)))
    if tensor.zero_OG is not None:
        tensor = replace(tensor, zero_OG=tensor.zero_OG.clamp(min=scheme.qmin + less))
    return tensor, less


def by_hand(columns: list[list[int]], bits: int) -> list[list[int]]:
    """Pack columns with Python's integers, following the description of the format word by word."""
    packed = []
    for column in columns:
        words: list[int] = []
        for start in range(0, len(column), 32):
            v = column[start : start + 32]
            if bits == 3:
                first = sum(v[i] << 3 * i for i in range(10)) | (v[10] & 3) << 30
                second = v[10] >> 2 | sum(v[11 + i] << 3 * i + 1 for i in range(10)) | (v[21] & 1) << 31
                third = v[21] >> 1 | sum(v[22 + i] << 3 * i + 2 for i in range(10))
                words += [first, second, third]
            else:
                each = 32 // bits
                words += [sum(v[w + i] << bits * i for i in range(each)) for w in range(0, 32, each)]
        packed.append([word - (1 << 32) if word >> 31 else word for word in words])
    return packed


@settings(max_examples=120, deadline=None)
@given(a_case())
def test_codes_come_back(case: tuple[QTensor, int]) -> None:
    tensor, less = case
    scheme, parts = tensor.scheme, pack(tensor, less)
    (rows, width), groups, middle = tensor.codes_OI.shape, tensor.scale_OG.shape[1], 2 ** (scheme.bits - 1)
    assert parts.keys() == {"qweight", "qzeros", "scales", "g_idx"}
    assert all(part.is_contiguous() for part in parts.values())
    assert [part.dtype for part in parts.values()] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert parts["qweight"].shape == (width * scheme.bits // 32, rows)
    assert parts["qzeros"].shape == (groups, rows * scheme.bits // 32)
    assert parts["scales"].shape == (groups, rows)
    assert parts["g_idx"].tolist() == [i // (width // groups) for i in range(width)]

    codes = [[code + middle for code in row] for row in tensor.codes_OI.tolist()]
    assert parts["qweight"].T.tolist() == by_hand(codes, scheme.bits)
    signed_OG = torch.zeros(rows, groups) if tensor.zero_OG is None else tensor.zero_OG
    zeros = [[int(zero) + middle - less for zero in column] for column in signed_OG.T.tolist()]
    assert parts["qzeros"].tolist() == by_hand(zeros, scheme.bits)

    assert torch.equal(unpack(parts, scheme.bits, less), tensor.dequantize(torch.float32))


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_version_1_of_a_symmetric_grid_repeats_one_word(bits: int, word: int) -> None:
    """The constants that every GPTQ folder of old holds."""
    scheme, more = Scheme(bits=bits, group_size=32, symmetric=True), {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    first, second = (pack(a_tensor(scheme, 32, 64, scale_dtype=torch.float16), less)["qzeros"] for less in (1, 0))
    assert set(first.flatten().tolist()) == {word}
    assert {value & 0xFFFFFFFF for value in second.flatten().tolist()} == {word + more}


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_point_of_0_in_version_1_is_noticed(bits: int) -> None:
    """It is read as 2**bits: reading back must not undo what no kernel undoes."""
    tensor = a_tensor(Scheme(bits=bits, group_size=32), 32, 64, scale_dtype=torch.float16)
    off = deviation(unpack(pack(tensor, 1), bits, 1), tensor)
    assert off == pytest.approx(2**bits)


def facts(scheme: str = "W4A16g32", shape: tuple[int, int] = (64, 64), **known: object) -> Facts:
    return Facts(scheme=Scheme.parse(scheme), architecture="A", shapes={"a.b": shape}, **known)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", [Gptq(), GptqV1()], ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("what", "words"),
    [
        (facts("W5A16g32_sym"), "2, 3, 4 and 8 bits, not 5"),
        (facts("W8A8"), "compressed-tensors"),
        (facts("W4A16g8_sym"), "groups of a multiple of 16 inputs, not 8"),
        (facts("W4A16_sym", (64, 48)), "a.b has 48 inputs and 64 outputs"),
        (facts("W4A16_sym", (48, 64)), "a.b has 64 inputs and 48 outputs"),
        (facts("W4A16_sym", fp16_scales=False), "--scale-dtype float16"),
        (facts("W4A16_sym"), None),
        (facts("W2A16g16_sym"), None),
    ],
)
def test_refusals(form: Gptq, what: Facts, words: str | None) -> None:
    reason = form.refusal(what)
    assert reason is None if words is None else reason is not None and words in reason


def test_version_1_takes_asymmetric_grids_only_where_no_zero_point_is_0() -> None:
    assert Gptq().refusal(facts(zeros=(-8, 7))) is None
    for unsafe in (facts(), facts(zeros=(-8, 7))):
        assert "wraps around: choose gptq" in (GptqV1().refusal(unsafe) or "")
    assert GptqV1().refusal(facts(zeros=(-7, 7))) is None


def a_solved_folder(tmp_path: Path, scheme: str, family: str = "llama") -> Solved:
    recipe = small(
        tiny_folder(family, tmp_path / "model"),
        tmp_path / "solved",
        a_text(tmp_path / "text.txt"),
        scheme=Scheme.parse(scheme),
        method="rtn",
        eval=Eval(datasets=()),
    )
    quantize(recipe)
    return Solved(tmp_path / "solved")


@pytest.mark.parametrize("scheme", ["W3A16g32", "W4A16_sym", "W2A16g16", "W8A16g64_sym"])
def test_a_model(tmp_path: Path, scheme: str) -> None:
    solved = a_solved_folder(tmp_path, scheme, "llama-tied")
    parts = list(solved.parts())
    kept = {name for part in parts for name in part.kept}
    versions = [Gptq(), *([GptqV1()] if solved.scheme.symmetric else [])]
    for form, done in zip(
        versions, export_model(solved.path, [form.name for form in versions], out=tmp_path), strict=True
    ):
        assert (done.deviation, done.linears, done.kept) == (0.0, 21, len(kept))
        stored = tensors(done.path)
        for name, tensor in ((name, tensor) for part in parts for name, tensor in part.quantized.items()):
            own = {part: stored.pop(f"{name}.{part}") for part in form.parts}
            assert torch.equal(form.unpack(own, solved), tensor.dequantize(torch.float32))
        assert stored.keys() == kept
        written = json.loads((done.path / "config.json").read_text())["quantization_config"]
        assert json.loads((done.path / "quantize_config.json").read_text()) == written
        meta = {"meta": {"quantizer": [f"makeweight:{__version__}"]}} if form.name == "gptq" else {}
        assert written == {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2" if form.name == "gptq" else "gptq",
            "bits": solved.scheme.bits,
            "group_size": solved.scheme.group_size,
            "sym": solved.scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            **meta,
        }


def test_what_was_left_alone_has_a_rule(tmp_path: Path) -> None:
    """Rules name modules from their first letter to a dot or the end, and the parent where nothing in it was solved."""
    solved = a_solved_folder(tmp_path, "W3A16g32")
    attention = [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkvo"]
    left = (*attention, "model.layers.1.mlp.up_proj", "lm_head")
    vars(solved).update(ignore=left, names=tuple(name for name in solved.names if name not in left))
    dynamic = Gptq().quantization_config(solved)["dynamic"]
    assert dynamic == {r"-:^model\.layers\.1\.self_attn(\.|$)": {}, r"-:^model\.layers\.1\.mlp\.up_proj(\.|$)": {}}
    rules = [re.compile(rule.removeprefix("-:")) for rule in dynamic]

    def skipped(name: str) -> bool:
        return any(rule.match(name) for rule in rules)

    assert skipped("model.layers.1.self_attn.q_proj") and skipped("model.layers.1.self_attn.qkv_proj")
    assert skipped("model.layers.1.mlp.up_proj") and not skipped("model.layers.1.mlp.down_proj")
    assert not skipped("model.layers.11.self_attn.q_proj") and not skipped("lm_head")


def test_what_was_left_alone_where_tensors_lack_the_models_prefix(tmp_path: Path) -> None:
    solved = a_solved_folder(tmp_path, "W3A16g32")
    left = ("model.decoder.project_in", "model.decoder.layers.1.fc1", "model.decoder.layers.2.attn.q_proj")
    vars(solved).update(ignore=left, names=("decoder.layers.0.fc1", "decoder.layers.1.fc2"))
    assert list(Gptq().quantization_config(solved)["dynamic"]) == [
        r"-:^model\.decoder\.project_in(\.|$)",
        r"-:^model\.decoder\.layers\.1\.fc1(\.|$)",
        r"-:^model\.decoder\.layers\.2\.attn(\.|$)",
    ]


def test_auto_round_describes_the_same_tensors(tmp_path: Path) -> None:
    solved = a_solved_folder(tmp_path, "W3A16g32")
    ours, other = export_model(solved.path, ["gptq", "auto-round"], out=tmp_path / "formats")
    assert tensors(ours.path).keys() == tensors(other.path).keys()
    assert all(torch.equal(tensor, tensors(other.path)[name]) for name, tensor in tensors(ours.path).items())
    config = json.loads((other.path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["packing_format"], config["bits"]) == ("auto-round", "auto_round", 3)
    assert not (other.path / "quantize_config.json").exists()


def test_version_1_of_an_asymmetric_model(tmp_path: Path) -> None:
    """With 256 codes for a whole row no zero-point is 0; with 4 codes for 16 weights some are."""
    assert export_model(a_solved_folder(tmp_path / "8", "W8A16").path, ["gptq-v1"])[0].deviation == 0.0
    with pytest.raises(UserError, match="wraps around: choose gptq"):
        export_model(a_solved_folder(tmp_path / "2", "W2A16g16").path, ["gptq-v1"])
