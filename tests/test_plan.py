"""Method strings become plans whatever the order typed, and what cannot work is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from makeweight.errors import UserError
from makeweight.methods.grid.clip import Lwc, Rtn
from makeweight.methods.loss.cross_layer import CrossLayer, Mse
from makeweight.methods.presets import COMPOSED, PRESETS
from makeweight.methods.weight.sde import Sde
from makeweight.models.checkpoint import Checkpoint
from makeweight.models.inspect import describe
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from makeweight.plan import check, compose, fits, settings, unused
from makeweight.recipe import Calib, Eval, Recipe, Tune
from tests.tiny import tiny_folder


def refused(method: str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        compose(method, **kwargs)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.mark.parametrize("parts", list(permutations(("lwc", "sde", "cl"))), ids="+".join)
def test_parts_are_sorted_by_stage(parts: tuple[str, ...]) -> None:
    plan = compose("+".join(parts))
    assert plan.names == ("sde", "lwc", "cl")
    assert (plan.maps, plan.grid, plan.loss) == ((Sde(),), Lwc(), CrossLayer())
    assert plan.learns
    assert plan == compose(" + ".join(parts).upper())


@pytest.mark.parametrize(
    ("method", "maps", "grid", "loss", "learns"),
    [
        ("rtn", (), Rtn(), Mse(), False),
        ("lwc", (), Lwc(), Mse(), True),
        ("sde", (Sde(),), Rtn(), Mse(), True),
        ("lsi", (Sde(band=0),), Rtn(), Mse(), True),
        ("sde+rtn", (Sde(),), Rtn(), Mse(), True),
        ("cl+lwc", (), Lwc(), CrossLayer(), True),
        ("cl+sde", (Sde(),), Rtn(), CrossLayer(), True),
    ],
)
def test_what_is_left_out_has_a_default(method: str, maps: Any, grid: Any, loss: Any, learns: bool) -> None:
    plan = compose(method)
    assert (plan.maps, plan.grid, plan.loss, plan.learns) == (maps, grid, loss, learns)


def test_settings_and_rates_reach_their_steps() -> None:
    options = {"sde": {"band": 2, "drift": 1}, "cl": {"ahead": 1, "decay": 0.5}, "lwc": {"logit": 3}}
    plan = compose("lwc+sde+cl", options=options, rates={"sde": 0.25, "lwc": 0.5})
    assert plan.maps == (Sde(band=2, drift=1, rate=0.25),)
    assert plan.grid == Lwc(logit=3, rate=0.5)
    assert plan.loss.weights() == (1.0, 0.5)
    assert compose("lwc+sde+cl").maps == (Sde(),), "settings must not stay behind"


@pytest.mark.parametrize("name", PRESETS)
def test_every_pair_composes_or_is_refused(name: str) -> None:
    for other in PRESETS:
        try:
            plan = compose(f"{name}+{other}")
        except UserError as error:
            assert name in str(error) or other in str(error)
        else:
            assert set(plan.names) == {name, other}
            assert plan == compose(f"{other}+{name}")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("lwx", "method 'lwx' is unknown (did you mean 'lwc'?)"),
        ("lwc+sdee+cl", "method 'sdee' is unknown (did you mean 'sde'?)"),
        ("zzzzz", "method 'zzzzz' is unknown: choose among rtn, lwc, autoround, flipround, stepsize, mse, percentile"),
        ("lwc+", "method '' is unknown"),
        ("", "method '' is unknown"),
        ("lwc,sde", "is unknown"),
        ("sde+lwc+SDE", "names sde twice"),
        ("lsi+sde", "sde contains lsi as its band 0"),
        ("sde+lwc+lsi", "sde contains lsi as its band 0"),
        ("rtn+lwc", "2 ways to the grid (rtn, lwc)"),
        ("lwc+sde+rtn", "2 ways to the grid"),
        ("cl", "cl has nothing to judge"),
        ("rtn+cl", "cl has nothing to judge"),
        ("cl+rtn", "cl has nothing to judge"),
        ("rtn+aug", "aug has nothing to judge"),
    ],
)
def test_impossible_methods(method: str, says: str) -> None:
    assert says in refused(method)


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("sde", {"sde": {"bnad": 3}}, "sde has no setting 'bnad' (did you mean 'band'?)"),
        ("sde", {"sde": {"zzz": 3}}, "it has band, rate, lead, drift"),
        ("rtn", {"rtn": {"rate": 1.0}}, "rtn has no setting 'rate': it has none"),
        ("sde", {"sde": {"band": "wide"}}, f"sde.band='wide' is not possible: give a value like {Sde().band}"),
        ("sde", {"sde": {"band": 2.5}}, "sde.band=2.5 is not possible"),
        ("sde", {"sde": {"band": True}}, "sde.band=True is not possible"),
        ("sde", {"sde": {"drift": True}}, "sde.drift=True is not possible"),
        ("lwc", {"lwc": {"logit": "big"}}, "lwc.logit='big' is not possible"),
        ("lwc", {"sde": {"band": 2}}, "a setting is given for 'sde', which is not part of 'lwc'"),
        (
            "omniquant",
            {"omniquant": {"rate": 0.1}},
            "'omniquant', which stands for scale, let, lwc: give it to one of these",
        ),
        ("sde", {"sde": {"band": -1}}, "sde: band -1"),
        ("sde", {"sde": {"drift": 0.0}}, "sde: drift 0.0"),
        ("lwc+cl", {"cl": {"ahead": 0}}, "cl: ahead 0"),
        ("lwc+cl", {"cl": {"decay": 0.0}}, "cl: ahead 1 must be at least 1 and decay 0.0"),
        ("lwc+cl", {"cl": {"ahead": 2, "decay": 1e200}}, "decay 1e+200 above 0, and neither of them above 100"),
        ("lwc+e2e", {"e2e": {"steps": 0}}, "e2e: steps 0 and batch_size 1 must be at least 1"),
        ("autoround", {"autoround": {"start": "hqq"}}, "autoround: start 'hqq' is unknown: choose inputs, mse"),
        (
            "autoround",
            {"autoround": {"descent": "sgd"}},
            "autoround: descent 'sgd' is unknown: choose",
        ),
        ("lwc+e2e", {"e2e": {"target": "labels"}}, "e2e: target 'labels' is unknown: choose logits or text"),
        ("lwc+e2e", {"e2e": {"batch_size": 0}}, "batch_size 0 must be at least 1"),
        ("lwc+e2e", {"e2e": {"norms": "no"}}, "e2e.norms='no' is not possible: give true or false"),
        ("lwc+aug+cl", {"aug": {"weight": -1.0}}, "aug: weight -1.0 must be above 0"),
        ("lwc", {"lwc": {"rate": -0.2}}, "lwc.rate=-0.2 is not a rate: give a number that is not negative"),
        ("lwc+e2e", {"e2e": {"norm_rate": -1.0}}, "e2e.norm_rate=-1.0 is not a rate"),
    ],
)
def test_impossible_settings(method: str, settings: dict[str, dict[str, Any]], says: str) -> None:
    assert says in refused(method, options=settings)


def test_impossible_rates() -> None:
    assert "'sde', which is not part of 'lwc'" in refused("lwc", rates={"sde": 1e-3})
    assert "cl has no setting 'rate'" in refused("lwc+cl", rates={"cl": 1e-3})
    assert "use --set e2e.norm_rate=VALUE" in refused("lwc+e2e", rates={"e2e.norm": 1e-3})
    assert "'e2e.nrom', which is not part of 'lwc+e2e'" in refused("lwc+e2e", rates={"e2e.nrom": 1e-3})


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks whose linears have 64 or 128 inputs, and 256 positions."""
    return open_checkpoint(tiny_folder("llama", tmp_path_factory.mktemp("plan") / "tiny"))


def test_scaling_needs_a_known_family(tmp_path: Path) -> None:
    unknown = open_checkpoint(tiny_folder("gpt-neox", tmp_path / "tiny"))
    with pytest.raises(UserError, match="method 'let' cannot be used with tiny: it is not known which outputs"):
        checked(unknown, method="let+lwc")
    reasons = fits(describe(unknown))
    assert reasons["scale"] and not reasons["sde"]
    checked(unknown, method="lwc+sde+cl")


def test_hqq_needs_zero_points(ckpt: Checkpoint) -> None:
    with pytest.raises(UserError, match="method 'hqq' cannot be used at W3A16g32_sym: it solves for zero-points"):
        checked(ckpt, "W3A16g32_sym", "sde+hqq")
    checked(ckpt, "W3A16g32", "sde+hqq")


def test_published_names_stand_for_their_parts() -> None:
    for name, composed in COMPOSED.items():
        assert compose(f"{name}+sde+cl") == compose("+".join(("cl", *composed.parts, "sde")))
    assert "names lwc twice" in refused("omniquant+lwc")
    assert "did you mean 'omniquant'" in refused("omniqant")


def checked(ckpt: Checkpoint, scheme: str = "W3A16g32", method: str = "lwc", **changes: Any) -> range:
    values: dict[str, Any] = {"calib": Calib(seqlen=256), "eval": Eval(seqlen=256), **changes}
    recipe = Recipe(model="tiny", out="out", method=method, scheme=Scheme.parse(scheme), **values)
    return check(compose(method), recipe, ckpt)


def test_blocks(ckpt: Checkpoint) -> None:
    assert checked(ckpt) == range(3)
    assert checked(ckpt, blocks=(0, 3)) == range(3)
    assert checked(ckpt, blocks=(1, 2)) == range(1, 2)
    for outside in ((0, 4), (3, 4), (7, 9)):
        with pytest.raises(UserError, match=f"blocks {outside[0]}:{outside[1]} do not exist: tiny has blocks 0:3"):
            checked(ckpt, blocks=outside)


@pytest.mark.parametrize("scheme", ["W3A16", "W3A16g16", "W3A16g64", "W8A16g1_sym"])
def test_group_sizes_that_fit(ckpt: Checkpoint, scheme: str) -> None:
    assert checked(ckpt, scheme) == range(3)


@pytest.mark.parametrize("group", [48, 96, 100, 128, 4096])
def test_group_sizes_that_do_not_fit(ckpt: Checkpoint, group: int) -> None:
    with pytest.raises(UserError) as caught:
        checked(ckpt, f"W3A16g{group}")
    text = str(caught.value)
    assert text.startswith(f"group size {group} does not divide the 64 inputs of model.layers.0.self_attn.q_proj")
    assert text.endswith("use one of 16, 32, 64, or -1 for one scale per channel.")
    for size in (16, 32, 64, -1):
        checked(ckpt, "W3A16" if size == -1 else f"W3A16g{size}")


def test_a_group_size_is_checked_in_the_chosen_blocks_only(ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {i: {"even": (8, 64), "odd": (8, 64 if i == 1 else 24)} for i in range(3)}
    monkeypatch.setattr(ckpt, "linear_shapes", lambda i=0: shapes[i])
    assert checked(ckpt, "W3A16g64", blocks=(1, 2)) == range(1, 2)
    with pytest.raises(UserError, match=r"24 inputs of model\.layers\.2\.odd: use one of none, or -1"):
        checked(ckpt, "W3A16g64", blocks=(1, 3))


def test_blocks_that_hold_different_linears(ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where some layers take the keys for values: half of the run would be done before the first of them."""
    shapes = [dict(ckpt.linear_shapes(i)) for i in range(3)]
    del shapes[2]["self_attn.v_proj"]
    monkeypatch.setattr(ckpt, "linear_shapes", lambda i=0: shapes[i])
    with pytest.raises(UserError, match=r"blocks differ, self_attn\.v_proj is in one of blocks 0 and 2 only"):
        checked(ckpt, blocks=(0, 1))


def test_samples_longer_than_the_model(ckpt: Checkpoint) -> None:
    long = Calib(seqlen=257)
    for method, calib in (("lwc", Calib(seqlen=257, piece=257)), ("gptq", long), ("lwc+e2e", long)):
        with pytest.raises(UserError, match="seqlen 257 is longer than the 256 positions of tiny: give 256 or less"):
            checked(ckpt, method=method, calib=calib)
    assert checked(ckpt, calib=long) == range(3), "blocks see pieces, which fit"
    assert checked(ckpt, method="rtn", calib=long) == range(3), "nothing is calibrated, so no length matters"


def test_windows_longer_than_the_model(ckpt: Checkpoint) -> None:
    with pytest.raises(UserError, match="seqlen 257 is longer than the 256 positions of tiny: give 256 or less"):
        checked(ckpt, eval=Eval(seqlen=257))
    assert checked(ckpt, eval=Eval(seqlen=257, datasets=())) == range(3), "nothing is evaluated, so no length matters"


def test_fits_speaks_of_every_method(ckpt: Checkpoint, tmp_path: Path) -> None:
    for described in (ckpt, open_checkpoint(tiny_folder("gpt-neox", tmp_path))):
        verdicts = fits(describe(described))
        assert verdicts.keys() == PRESETS.keys()
        assert all(reason is None or reason.strip() for reason in verdicts.values())
        unfit = [name for name, method in PRESETS.items() if method.step.needs_edges and described is not ckpt]
        assert [name for name, reason in verdicts.items() if reason] == unfit


def test_options_that_change_nothing_are_named() -> None:
    given = Recipe(
        model="m",
        out="o",
        calib=Calib(dataset="text.txt", nsamples=8, seqlen=32, piece=16),
        tune=Tune(steps=4, batch_size=3),
        eval=Eval(datasets=(), windows=2),
    )

    def left_aside(method: str) -> str:
        return " ".join(unused(replace(given, method=method)))

    assert left_aside("flipround+e2e") == "--eval-windows"
    assert left_aside("rtn+e2e") == "--batch-size --piece --steps --eval-windows"
    assert left_aside("gptq") == "--piece --steps --eval-windows"
    unread = "--dataset --nsamples --seqlen --batch-size --piece --steps --eval-windows"
    assert left_aside("rtn") == unread
    assert unused(Recipe(model="m", out="o", method="rtn")) == []
    by_inputs = replace(given, method="mse", options={"mse": {"inputs": True}})
    assert "--dataset" in " ".join(unused(replace(given, method="mse"))) and "--dataset" not in unused(by_inputs)


def test_what_can_be_set_of_methods_is_given_as_it_is_written_in_an_option() -> None:
    header, rows = settings("rtn+e2e")
    assert header == ("--set", "default")
    assert ("e2e.norms", "true") in rows and ("e2e.batch_size", "1") in rows
    assert settings("rtn")[1] == []
    assert {name.partition(".")[0] for name, _ in settings("omniquant")[1]} == {"let", "lwc"}
