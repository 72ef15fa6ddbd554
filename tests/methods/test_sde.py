"""The unit in which SDE and LSI learn."""

from __future__ import annotations

import pytest
import torch

from makeweight.methods.base import Context
from makeweight.methods.weight.sde import Sde
from makeweight.numerics.scheme import Scheme

CONTEXT = Context(scheme=Scheme(bits=3, group_size=16), scale_dtype=torch.bfloat16, dtype=torch.float32, steps=200)


@pytest.mark.parametrize("band", [0, 2])
def test_a_matrix_of_low_rank_moves(band: int) -> None:
    """Most of its singular values are noise, which is no unit to learn in."""
    generator = torch.Generator().manual_seed(0)
    low_OI = torch.randn(32, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    built = Sde(band=band, drift=1.0).build({"low": low_OI}, CONTEXT)
    (params,) = (group.params for group in built.learnables())
    with torch.no_grad():
        params[0].fill_(0.1)
        moved = float((built({"low": low_OI})["low"] - low_OI).norm() / low_OI.norm())
    assert 0.05 < moved < 1.0
