"""Words of the command line: each stands for one setting, or is refused in a sentence."""

from __future__ import annotations

import pytest

from makeweight.errors import UserError
from makeweight.options import evaluated, parse_option, parse_rate


def test_parse_option() -> None:
    assert parse_option("sde.band=16") == ("sde", "band", 16)
    assert parse_option("cl.decay=0.5") == ("cl", "decay", 0.5)
    assert parse_option("sde.dense-block=8") == ("sde", "dense_block", 8)
    assert parse_option("lwc.joint=True") == ("lwc", "joint", True)
    assert parse_option("sde.where=down_proj") == ("sde", "where", "down_proj")
    for wrong in ("band=16", "sde.band", "sde.band=", ".=1"):
        with pytest.raises(UserError, match=r"sde\.band=16"):
            parse_option(wrong)


def test_parse_rate() -> None:
    assert parse_rate("sde=3e-3") == ("sde", 3e-3)
    for wrong in ("sde", "=1", "sde=fast", "sde=nan"):
        with pytest.raises(UserError, match="sde=3e-3"):
            parse_rate(wrong)


def test_evaluation_can_be_left_out() -> None:
    assert evaluated(None, no_eval=True) == ()
    assert evaluated(None, no_eval=False) is None
    assert evaluated(["a"], no_eval=False) == ("a",)
    with pytest.raises(UserError, match="--no-eval and --eval-dataset say opposite things"):
        evaluated(["a"], no_eval=True)
