"""Recipes: JSON both ways to the byte, and one sentence for every wrong value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeweight import evaluate, export_model
from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme
from makeweight.recipe import Calib, Eval, Recipe, Tune, parse_blocks

NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
RATES = st.floats(0, 1, allow_nan=False)
RECIPES = st.builds(
    Recipe,
    model=st.text(min_size=1).filter(str.strip),
    out=st.just("out"),
    method=st.sampled_from(["rtn", "lwc+sde+cl"]),
    scheme=st.builds(Scheme, bits=st.integers(2, 8), group_size=st.sampled_from([-1, 32, 64]), symmetric=st.booleans()),
    blocks=st.none() | st.integers(0, 9).map(lambda first: (first, first + 3)),
    calib=st.builds(Calib, nsamples=st.integers(1, 512), seqlen=st.integers(2, 4096), piece=st.integers(2, 4096)),
    tune=st.builds(Tune, steps=st.integers(0, 999), rates=st.dictionaries(NAMES, RATES, max_size=3)),
    eval=st.builds(Eval, datasets=st.lists(NAMES, max_size=3).map(tuple), windows=st.none() | st.integers(1, 9)),
    seed=st.integers(0, 2**31),
    options=st.dictionaries(
        NAMES, st.dictionaries(NAMES, st.booleans() | st.integers() | RATES | NAMES, max_size=3), max_size=3
    ),
    trust_remote_code=st.booleans(),
)


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"model": "m", "out": "o", **changes})


@given(RECIPES)
def test_json_both_ways(made: Recipe) -> None:
    text = made.to_json()
    again = Recipe.from_json(text)
    assert again == made
    assert again.to_json() == text
    for name, given_options in made.options.items():
        for key, value in given_options.items():
            assert type(again.options[name][key]) is type(value)


def test_order_of_names_does_not_matter() -> None:
    one = recipe(options={"sde": {"band": 2, "dense": 8}, "cl": {"ahead": 2}}, tune=Tune(rates={"b": 1, "a": 2}))
    two = recipe(options={"cl": {"ahead": 2}, "sde": {"dense": 8, "band": 2}}, tune=Tune(rates={"a": 2, "b": 1}))
    assert one.to_json() == two.to_json()


def test_save_and_load(tmp_path: Path) -> None:
    made = recipe(blocks=(0, 8), scheme=Scheme.parse("W3A16g64"))
    made.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == made
    assert json.loads((tmp_path / "recipe.json").read_text())["blocks"] == "0:8"


def test_written_by_hand() -> None:
    made = Recipe.from_json(
        '{"model": "m", "out": "o", "scheme": "W3A16g64", "blocks": [0, 8], "calib": {"seqlen": 512}}'
    )
    assert made == recipe(scheme=Scheme.parse("W3A16g64"), blocks=(0, 8), calib=Calib(seqlen=512))


def test_what_is_given_beside_a_saved_part_comes_first(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"out": "o", "eval": {"windows": [12, 6]}}')
    read = Recipe.load(tmp_path / "r.json", model="m", out=None)
    assert (read.model, read.out, read.eval.windows) == ("m", "o", (12, 6))
    assert Recipe.load(tmp_path / "r.json", model="m", out="p").out == "p"


def test_given_tables_are_copied() -> None:
    options = {"sde": {"band": 2}}
    made = recipe(options=options)
    options["sde"]["band"] = 16
    assert made.options == {"sde": {"band": 2}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON: .* in line 1"),
        ("[]", "not a table"),
        ("{}", "does not say 'model'"),
        ('{"model": "m"}', "does not say 'out'"),
        ('{"model": "m", "out": "o", "methox": "rtn"}', r"unknown key 'methox' \(did you mean 'method'\?\)"),
        ('{"model": "m", "out": "o", "version": 2}', "unknown key 'version': leave it out, or use the version that"),
        ('{"model": "m", "out": "o", "seed": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"model": "m", "out": "o", "calib": {"nsample": 1}}', r"calib .* 'nsample' \(did you mean 'nsamples'\?\)"),
        ('{"model": "m", "out": "o", "calib": {"nsamples": "1"}}', "calib.nsamples='1' is not a whole number"),
        ('{"model": "m", "out": "o", "calib": {"nsamples": 1.0}}', "calib.nsamples=1.0 is not a whole number"),
        ('{"model": "m", "out": "o", "calib": {"nsamples": true}}', "not a whole number"),
        ('{"model": "m", "out": "o", "calib": null}', "calib is None"),
        ('{"model": "m", "out": "o", "scheme": "W4A8"}', "8-bit activations"),
        ('{"model": "m", "out": "o", "scheme": null}', "scheme=None is not a Scheme"),
        ('{"model": "m", "out": "o", "scheme": {"bits": "4"}}', "scheme.bits='4' is not a whole number"),
        ('{"model": "m", "out": "o", "scheme": {"symmetric": 1}}', "scheme.symmetric=1 is neither"),
        ('{"model": "m", "out": "o", "scheme": {"bit": 4}}', "did you mean 'bits'"),
        ('{"model": "m", "out": "o", "blocks": "8"}', "write it like 0:8"),
        ('{"model": "m", "out": "o", "blocks": [0, 8, 9]}', "not a range"),
        ('{"model": "m", "out": "o", "tune": {"rates": {"sde": NaN}}}', "tune.rates.sde=nan is not a rate"),
        ('{"model": "m", "out": "o", "tune": {"rates": {"sde": "big"}}}', "tune.rates.sde='big' is not a rate"),
        ('{"model": "m", "out": "o", "options": {"sde": {"band": [2]}}}', "options.sde.band="),
        ('{"model": "m", "out": "o", "options": {"sde": 2}}', "options.sde is 2"),
        ('{"model": "m", "out": "o", "eval": {"datasets": "wikitext2"}}', "not a list"),
        ('{"model": "m", "out": "o", "eval": {"baseline": "no"}}', "neither true nor false"),
    ],
)
def test_json_refusals(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": " "}, "model=' ' is empty"),
        ({"out": ""}, "out='' is empty"),
        ({"method": None}, "method=None is empty or not text"),
        ({"method": b"rtn"}, "method=b'rtn' is empty or not text"),
        ({"scheme": "W4A16"}, "is not a Scheme"),
        ({"blocks": (3, 3)}, "3:3 is empty"),
        ({"blocks": (0.0, 3.0)}, "not a range"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"seed": 2**63}, "is too large: give 9223372036854775807 or less"),
        ({"trust_remote_code": "yes"}, "neither true nor false"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (Calib, {"seqlen": 1}, "calib.seqlen=1 is too small: give 2"),
        (Calib, {"piece": 1}, "calib.piece=1 is too small: give 2"),
        (Calib, {"dataset": ""}, "calib.dataset"),
        (Tune, {"steps": -1}, "tune.steps"),
        (Tune, {"batch_size": 0}, "tune.batch_size"),
        (Tune, {"checks": 0}, "tune.checks"),
        (Tune, {"dtype": "float16"}, "choose auto, bfloat16 or float32"),
        (Tune, {"device": "tpu"}, "choose auto, cpu or cuda"),
        (Tune, {"rates": {"sde": -1.0}}, "not negative"),
        (Eval, {"windows": 0}, "eval.windows"),
        (Eval, {"datasets": ("",)}, "eval.datasets"),
    ],
)
def test_part_refusals(kind: type, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        kind(**changes)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "half.json").write_text("{\n1")
    for name, says in (("none.json", "No such file"), ("bytes.json", "not UTF-8"), ("half.json", "not JSON.* line 2")):
        with pytest.raises(UserError, match=f"recipe '.*{name}'.*{says}"):
            Recipe.load(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("seqlen", "piece", "count"), [(2048, 256, 8), (256, 256, 1), (257, 256, 2), (10, 256, 1), (3, 2, 1), (7, 2, 3)]
)
def test_pieces_are_no_longer_than_asked_but_of_two_tokens_at_least(seqlen: int, piece: int, count: int) -> None:
    assert Calib(seqlen=seqlen, piece=piece).pieces == count
    assert seqlen // count <= max(piece, 3) and seqlen // count >= 2


def test_parse_blocks() -> None:
    assert parse_blocks("0:8") == (0, 8)
    for wrong in ("8", "a:b", "8:0", "-1:4", "0:8:2", ""):
        with pytest.raises(UserError):
            parse_blocks(wrong)


def test_public_names_without_torch() -> None:
    code = "import sys; from makeweight import Recipe, Scheme; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": SRC})
    assert done.stdout.strip() == "False", done.stderr


SRC = str(Path(__file__).parents[1] / "src")


def test_public_names_are_what_they_are_called() -> None:
    """A room of the same name would hide a function once anything in it is imported."""
    code = (
        "from makeweight import *; import makeweight, types; "
        "names = [n for n in makeweight.__all__ if isinstance(getattr(makeweight, n), types.ModuleType)]; "
        "assert not names, names"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paths_may_be_paths(tmp_path: Path) -> None:
    recipe = Recipe(model=tmp_path / "model", out=tmp_path / "out")  # pyright: ignore[reportArgumentType]
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.model == str(tmp_path / "model")
    text = tmp_path / "a.txt"
    assert Calib(dataset=text) == Calib(dataset=str(text))  # pyright: ignore[reportArgumentType]
    assert Eval(datasets=(text,)) == Eval(datasets=(str(text),))  # pyright: ignore[reportArgumentType]


def test_one_text_is_not_a_list_of_texts() -> None:
    with pytest.raises(UserError, match="put it in brackets"):
        evaluate("model", datasets="wikitext2")
    with pytest.raises(UserError, match="put it in brackets"):
        export_model("folder", "gptq")
    for bits in ("3", 3.5, True):
        with pytest.raises(UserError, match=f"bits={bits!r} is not a whole number"):
            Scheme(bits=bits)  # pyright: ignore[reportArgumentType]
