"""Schemes: the field's shorthand in, the same shorthand out, one sentence for what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "symmetric"),
    [
        ("W4A16", 4, -1, False),
        ("W3A16g64", 3, 64, False),
        ("w2a16G64_SYM", 2, 64, True),
        ("W4A16g128_asym", 4, 128, False),
        ("W8A16_sym", 8, -1, True),
        ("W3g64", 3, 64, False),
        ("W4A16g-1", 4, -1, False),
        ("  W5A16g32 ", 5, 32, False),
    ],
)
def test_parse(text: str, bits: int, group_size: int, symmetric: bool) -> None:
    assert Scheme.parse(text) == Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 32, 48, 64, 128]),
    symmetric=st.booleans(),
)
def test_shorthand_reads_back(bits: int, group_size: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    assert Scheme.parse(str(scheme)) == scheme
    assert scheme.qmax - scheme.qmin == 2**bits - 1


def test_parse_keeps_the_scale_dtype() -> None:
    assert Scheme.parse("W4A16", scale_dtype="float16").scale_dtype == "float16"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not understood"),
        ("4bit", "not understood"),
        ("W4A16g", "not understood"),
        ("W4A16KV4", "not understood"),
        ("W4A16g64_half", "not understood"),
        ("W4A8", "8-bit activations"),
        ("W1A16", "choose 2 to 8"),
        ("W9A16", "choose 2 to 8"),
        ("W4A16g0", "group size 0"),
        ("W4A16g-2", "group size -2"),
    ],
)
def test_refusals(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Scheme.parse(text)


def test_unknown_scale_dtype() -> None:
    with pytest.raises(UserError, match="choose auto, bfloat16, float16 or float32"):
        Scheme(scale_dtype="fp8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="symmetric=1 is neither true nor false"):
        Scheme(symmetric=1)  # pyright: ignore[reportArgumentType]


def test_group_of() -> None:
    assert Scheme(group_size=64).group_of(576, "q_proj") == 64
    assert Scheme(group_size=-1).group_of(577, "q_proj") == 577
    with pytest.raises(UserError, match=r"128 does not divide the 576 inputs of q_proj: use one of 16, 32, 48, 64, 96"):
        Scheme(group_size=128).group_of(576, "q_proj")


def test_eight_bit_activations() -> None:
    scheme = Scheme.parse("W8A8")
    assert (scheme.bits, scheme.group_size, scheme.symmetric, scheme.activations) == (8, -1, True, 8)
    assert str(scheme) == "W8A8" and Scheme.parse(str(scheme)) == scheme
    for text in ("W8A8g64", "W8A8_asym", "W4A8"):
        with pytest.raises(UserError, match="write W8A8"):
            Scheme.parse(text)
    with pytest.raises(UserError, match="choose 8 or 16"):
        Scheme(bits=8, activations=4)  # pyright: ignore[reportArgumentType]
