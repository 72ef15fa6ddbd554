"""Words of the command line: each stands for one setting, or is refused in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from makeweight.cli import main
from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme
from makeweight.options import evaluated, evaluation, parse_option, parse_rate, rates, remark, start
from makeweight.recipe import Eval, Recipe, Tune


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


def test_windows_for_each_text_go_with_the_texts() -> None:
    saved = Eval(datasets=("a", "b"), windows=(1, 2))
    assert evaluation(saved, None, None, None) == saved
    assert evaluation(saved, ("a", "b"), None, 64) == replace(saved, seqlen=64)
    assert evaluation(saved, (), None, None) == replace(saved, datasets=(), windows=None)
    assert evaluation(saved, ("c",), None, None) == replace(saved, datasets=("c",), windows=None)
    assert evaluation(saved, ("c",), 3, None) == replace(saved, datasets=("c",), windows=3)


def test_a_rate_that_is_set_takes_the_place_of_a_saved_one() -> None:
    saved = Recipe(model="m", out="o", tune=Tune(rates={"sde": 1e-3, "lwc": 1e-2}))
    assert rates(saved, None, None) is None
    assert rates(saved, None, ["sde.band=8"]) is None
    assert rates(saved, None, ["sde.rate=3e-3"]) == {"lwc": 1e-2}
    assert rates(saved, ["lwc=5e-2"], ["sde.rate=3e-3"]) == {"lwc": 5e-2}
    with pytest.raises(UserError, match=r"--lr sde and --set sde\.rate say the same thing"):
        rates(saved, ["sde=2e-3"], ["sde.rate=3e-3"])


def test_no_steps_are_remarked_where_they_would_have_learned(capsys: pytest.CaptureFixture[str]) -> None:
    idle = Recipe(model="m", out="o", method="lwc", tune=Tune(steps=0))
    remark(idle)
    assert capsys.readouterr().err == "With --steps 0 no block learns anything.\n"
    for quiet in (replace(idle, tune=Tune(steps=1)), Recipe(model="m", out="o", method="gptq")):
        remark(quiet)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("quantize --bits x", "--bits x is not a whole number: give one."),
        ("quantize --steps 2 --iters=1.5", "--iters 1.5 is not a whole number: give one."),
        ("quantize --group_size 9k", "--group-size 9k is not a whole number: give one."),
        ("evaluate . --windows 0", "--windows 0: input should be greater than or equal to 1."),
        ("verify", "Missing argument 'path'."),
    ],
)
def test_a_value_that_is_no_number_is_named(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"makeweight: {said}\n"


@pytest.mark.parametrize("model", [".", "./", "../model", "../model/../model/"])
def test_the_result_of_a_folder_is_named_after_it(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert start(model, None, Scheme()).out == "model-w4a16g128"


def test_the_result_of_a_link_is_named_after_the_link(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path)
    assert start(str(tmp_path / "model"), None, Scheme()).out == "model-w4a16g128"


def test_a_path_that_no_recipe_can_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--model", "m", "--out", "caf\udce9"]) == 2
    assert capsys.readouterr().err == (
        "makeweight: out='caf\\udce9' is not UTF-8, as a recipe has to be: give it another name.\n"
    )
