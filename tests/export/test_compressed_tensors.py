"""What is packed comes back code by code, from our reader, from compressed-tensors' own, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import helpers
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, QuantizationStrategy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from makeweight.export import compressed_tensors
from makeweight.export.compressed_tensors import pack, quantization_config
from makeweight.models import packed
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

packer, unpacker = helpers.pack_to_int32, helpers.unpack_from_int32
SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (-1, 16)
    for symmetric in (False, True)
]


def a_tensor(scheme: Scheme, rows: int, width: int, *, scale_dtype: torch.dtype, seed: int = 0) -> QTensor:
    """Return random codes of the whole range, both of whose ends appear."""
    generator = torch.Generator().manual_seed(seed)
    groups = width // scheme.group_of(width, "w")

    def integers(*shape: int) -> Tensor:
        drawn = torch.randint(scheme.qmin, scheme.qmax + 1, shape, generator=generator, dtype=torch.int8)
        drawn[0, 0], drawn[-1, -1] = scheme.qmin, scheme.qmax
        return drawn

    return QTensor(
        codes_OI=integers(rows, width),
        scale_OG=(torch.rand(rows, groups, generator=generator) + 0.01).to(scale_dtype),
        zero_OG=None if scheme.symmetric else integers(rows, groups),
        scheme=scheme,
    )


@st.composite
def tensors(draw: st.DrawFn) -> QTensor:
    size, count = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    channel = draw(st.booleans())
    scheme = Scheme(bits=draw(st.integers(2, 8)), group_size=-1 if channel else size, symmetric=draw(st.booleans()))
    scale_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    rows = draw(st.integers(1, 70))
    return a_tensor(scheme, rows, size * count, scale_dtype=scale_dtype, seed=draw(st.integers(0, 99)))


def by_hand(codes_OI: Tensor, bits: int) -> list[list[int]]:
    """Pack rows with Python's integers: code + 2**(bits - 1), low bits first, 32 bits a word, nothing between."""
    rows = []
    for row in codes_OI.tolist():
        number = sum((code + (1 << bits - 1)) << place * bits for place, code in enumerate(row))
        words = [number >> 32 * i & 0xFFFFFFFF for i in range(math.ceil(len(row) * bits / 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return rows


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_codes_come_back(tensor: QTensor) -> None:
    scheme, parts = tensor.scheme, pack("a.b", tensor)
    names = {"weight_packed", "weight_scale", "weight_shape"} | (set() if scheme.symmetric else {"weight_zero_point"})
    assert parts.keys() == {f"a.b.{name}" for name in names}
    local = {name.removeprefix("a.b."): part for name, part in parts.items()}
    assert all(part.is_contiguous() for part in local.values())
    assert local["weight_packed"].dtype == torch.int32
    assert local["weight_packed"].tolist() == by_hand(tensor.codes_OI, scheme.bits)
    assert local["weight_shape"].tolist() == list(tensor.codes_OI.shape)
    assert torch.equal(local["weight_scale"], tensor.scale_OG)
    if tensor.zero_OG is not None:
        assert local["weight_zero_point"].T.tolist() == by_hand(tensor.zero_OG.T, scheme.bits)

    assert torch.equal(packed.decode(local, (scheme.bits,), "a.b"), tensor.dequantize(torch.float32))
    assert torch.equal(compressed_tensors.unpack(local, scheme.bits), tensor.dequantize(torch.float32))
    group = tensor.codes_OI.shape[1] // tensor.scale_OG.shape[1]
    zero = 0 if tensor.zero_OG is None else tensor.zero_OG.int().repeat_interleave(group, 1)
    counted = packed.decode({**local, "weight_scale": torch.ones_like(tensor.scale_OG)}, (scheme.bits,), "a.b")
    assert torch.equal(counted.int() + zero, tensor.codes_OI.int())


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_compressed_tensors_decompresses_them(tensor: QTensor) -> None:
    """Its product is formed in the scales' dtype, from integers that every dtype holds: one rounding, as ours."""
    few = tensor.scheme.bits == 4 and tensor.zero_OG is not None and tensor.codes_OI.shape[0] <= 8
    assume(not few)  # its 4-bit reader cannot view a single row of packed zero-points
    config = QuantizationConfig.model_validate(quantization_config(tensor.scheme, []))
    scheme = config.config_groups["group_0"]
    assert not isinstance(scheme, list)
    local: dict[str, Tensor | None] = {name.removeprefix("a."): part for name, part in pack("a", tensor).items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    weight = compressor.decompress(local, scheme)["weight"]
    assert weight is not None and torch.equal(weight, tensor.dequantize(tensor.scale_OG.dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_configuration_says_what_was_done(scheme: Scheme) -> None:
    written = quantization_config(scheme, ["lm_head", "model.layers.0.mlp.up_proj"])
    config = QuantizationConfig.model_validate(written)
    assert config.format == "pack-quantized" and config.quantization_status == QuantizationStatus.COMPRESSED
    assert config.ignore == ["lm_head", "model.layers.0.mlp.up_proj"]
    (group,) = config.config_groups.values()
    assert not isinstance(group, list) and group.targets == ["Linear"]
    args = group.weights
    assert args is not None and (args.num_bits, args.symmetric) == (scheme.bits, scheme.symmetric)
    channel = scheme.group_size == -1
    assert args.strategy == (QuantizationStrategy.CHANNEL if channel else QuantizationStrategy.GROUP)
    assert args.group_size == (None if channel else scheme.group_size)
    assert group.input_activations is None and group.output_activations is None
    assert packed.declared_bits(written, "here") == (scheme.bits,)


@pytest.mark.parametrize("bits", range(2, 9))
def test_matrices_of_few_outputs(bits: int) -> None:
    """The zero-points of up to 32 / bits outputs fit into one row of words."""
    for rows in (1, 2, 4):
        tensor = a_tensor(Scheme(bits=bits, group_size=8), rows, 24, scale_dtype=torch.float32)
        local = {name.removeprefix("a."): part for name, part in pack("a", tensor).items()}
        assert torch.equal(packed.decode(local, (bits,), "a"), tensor.dequantize(torch.float32))


def test_codes_that_are_not_contiguous() -> None:
    scheme = Scheme(bits=3, group_size=16)
    tensor = a_tensor(scheme, 32, 48, scale_dtype=torch.bfloat16)
    assert tensor.zero_OG is not None
    turned = QTensor(
        codes_OI=tensor.codes_OI.T.contiguous().T,
        scale_OG=tensor.scale_OG,
        zero_OG=tensor.zero_OG.T.contiguous().T,
        scheme=scheme,
    )
    ours, other = pack("w", tensor), pack("w", turned)
    assert all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_packed_is_read_back_by_its_layout(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the reader that belongs to the packer: the two could be wrong alike."""
    tensor = a_tensor(scheme, 5, 48, scale_dtype=torch.bfloat16)
    parts = {name.removeprefix("w."): part for name, part in pack("w", tensor).items()}
    assert torch.equal(compressed_tensors.unpack(parts, scheme.bits), tensor.dequantize(torch.float32))
    monkeypatch.setattr(helpers, "pack_to_int32", lambda *args, **options: packer(*args, **options) ^ 1)
    monkeypatch.setattr(helpers, "unpack_from_int32", lambda words, *args: unpacker(words ^ 1, *args))
    parts = {name.removeprefix("w."): part for name, part in pack("w", tensor).items()}
    assert torch.equal(packed.decode(parts, (scheme.bits,), "w"), tensor.dequantize(torch.float32))
    assert not torch.equal(compressed_tensors.unpack(parts, scheme.bits), tensor.dequantize(torch.float32))
