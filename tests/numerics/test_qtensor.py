"""A quantized matrix stands for exactly one matrix, and its digest for exactly one quantized matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme


def sample(scheme: Scheme, rows: int = 3, width: int = 32, scale_dtype: torch.dtype = torch.bfloat16) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    groups = width // scheme.group_of(width, "w")
    span = (scheme.qmin, scheme.qmax + 1)
    zero = torch.randint(*span, (rows, groups), generator=generator, dtype=torch.int8)
    return QTensor(
        codes_OI=torch.randint(*span, (rows, width), generator=generator, dtype=torch.int8),
        scale_OG=(torch.rand(rows, groups, generator=generator) / 50 + 1e-3).to(scale_dtype),
        zero_OG=None if scheme.symmetric else zero,
        scheme=scheme,
    )


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize_is_exact(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    quantized = sample(Scheme(bits=bits, group_size=8, symmetric=symmetric), scale_dtype=scale_dtype)
    scale = quantized.scale_OG.double().repeat_interleave(8, 1)
    zero = 0.0 if quantized.zero_OG is None else quantized.zero_OG.double().repeat_interleave(8, 1)
    exact = (quantized.codes_OI.double() - zero) * scale
    assert torch.equal(quantized.dequantize(torch.float32).double(), exact)
    # One rounding, from the exact value: not a product formed in low precision.
    assert torch.equal(quantized.dequantize(torch.bfloat16), exact.bfloat16())


def test_digest_repeats() -> None:
    quantized = sample(Scheme(bits=3, group_size=8))
    copy = replace(quantized, codes_OI=quantized.codes_OI.T.contiguous().T, scale_OG=quantized.scale_OG.clone())
    assert not copy.codes_OI.is_contiguous()
    assert quantized.digest() == copy.digest()
    assert len(quantized.digest()) == 64


def test_digest_sees_everything_stored() -> None:
    quantized = sample(Scheme(bits=3, group_size=8))
    assert quantized.zero_OG is not None
    codes, scale, zero = (t.clone() for t in (quantized.codes_OI, quantized.scale_OG, quantized.zero_OG))
    codes[1, 5] ^= 1
    scale[2, 3] *= 2
    zero[0, 0] ^= 1
    variants = [
        replace(quantized, codes_OI=codes),
        replace(quantized, scale_OG=scale),
        replace(quantized, zero_OG=zero),
        replace(quantized, scheme=Scheme(bits=4, group_size=8)),
    ]
    assert len({q.digest() for q in (quantized, *variants)}) == 5


def test_digest_sees_every_code() -> None:
    quantized = sample(Scheme(bits=2, group_size=8), rows=2, width=8)
    digests = set()
    for row in range(2):
        for column in range(8):
            codes = quantized.codes_OI.clone()
            codes[row, column] ^= 1
            digests.add(replace(quantized, codes_OI=codes).digest())
    assert len(digests) == 16


def test_digest_sees_the_shape() -> None:
    wide = sample(Scheme(bits=3, group_size=4), rows=2, width=8)
    assert wide.zero_OG is not None
    tall = replace(
        wide, codes_OI=wide.codes_OI.view(4, 4), scale_OG=wide.scale_OG.view(4, 1), zero_OG=wide.zero_OG.view(4, 1)
    )
    assert wide.digest() != tall.digest()


def test_digest_sees_what_the_scales_mean() -> None:
    brain = sample(Scheme(bits=3, group_size=8))
    half = replace(brain, scale_OG=brain.scale_OG.view(torch.float16))
    assert not torch.equal(brain.dequantize(torch.float32), half.dequantize(torch.float32))
    assert brain.digest() != half.digest()


@pytest.mark.parametrize(
    ("text", "scale_dtype", "bits"),
    [
        ("W3A16g16", torch.bfloat16, 3 + (16 + 3) / 16),
        ("W4A16g16_sym", torch.bfloat16, 4 + 16 / 16),
        ("W2A16", torch.float16, 2 + (16 + 2) / 32),
        ("W8A16_sym", torch.float32, 8 + 32 / 32),
    ],
)
def test_bits_per_weight(text: str, scale_dtype: torch.dtype, bits: float) -> None:
    assert sample(Scheme.parse(text), scale_dtype=scale_dtype).bits_per_weight() == pytest.approx(bits, rel=1e-12)
