"""The command line: options become a recipe, mistakes become one sentence and code 2."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from makeweight import __version__
from makeweight.cli import main, normalize
from makeweight.effort import EFFORTS, with_effort
from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme
from makeweight.plan import compose
from makeweight.recipe import Recipe

SRC = str(Path(__file__).parents[1] / "src")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the engine, which is replaced: these tests are about the way there."""
    calls: list[Any] = []
    stand_in(
        monkeypatch,
        "makeweight.pipeline",
        quantize=lambda recipe: calls.append(recipe) or "record",
        preflight=lambda recipe: f"about {recipe.calib.nsamples} samples",
    )
    stand_in(monkeypatch, "makeweight.demo", demo=lambda out: calls.append(out))
    stand_in(monkeypatch, "makeweight.report.tables", show=lambda record: print(f"shown {record}"))
    return calls


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("makeweight: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_defaults(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--model", "org/Tiny-1B"]) == 0
    assert ran == [Recipe(model="org/Tiny-1B", out="tiny-1b-w4a16g128")]
    assert capsys.readouterr().out == "shown record\n"


def test_every_option(ran: list[Any]) -> None:
    line = (
        "quantize --model m --method lwc+sde+cl --bits 3 --group_size 64 --sym --scale_dtype float32 --blocks 0:8 "
        "--dataset a.txt --nsamples 48 --seqlen 512 --piece 128 --iters 192 --batch-size 2 --lr sde=3e-3 --lr lwc=1e-2 "
        "--set sde.band=16 --set cl.decay=0.5 --set sde.lead=8 --eval-dataset x --eval_dataset y --eval-windows 12 "
        "--output_dir here --format gguf,gptq --format dense --seed 7 --device cpu --trust-remote-code"
    )
    assert main(line.split()) == 0
    (made,) = ran
    assert made == Recipe.from_json(
        """{"model": "m", "method": "lwc+sde+cl", "out": "here", "blocks": "0:8", "seed": 7, "trust_remote_code": true,
        "scheme": {"bits": 3, "group_size": 64, "symmetric": true, "scale_dtype": "float32"},
        "calib": {"dataset": "a.txt", "nsamples": 48, "seqlen": 512, "piece": 128},
        "tune": {"steps": 192, "batch_size": 2, "device": "cpu", "rates": {"sde": 3e-3, "lwc": 1e-2}},
        "options": {"sde": {"band": 16, "lead": 8}, "cl": {"decay": 0.5}},
        "eval": {"datasets": ["x", "y"], "windows": 12}, "formats": ["gguf", "gptq", "dense"]}"""
    )


def test_recipe_file_with_overrides(ran: list[Any], tmp_path: Path) -> None:
    saved = Recipe.from_json(
        """{"model": "m", "out": "o", "method": "lwc+sde", "scheme": "W3A16g64",
        "calib": {"nsamples": 48, "seqlen": 512}, "tune": {"rates": {"sde": 1e-3, "lwc": 1e-2}},
        "options": {"sde": {"band": 2}}, "trust_remote_code": true}"""
    )
    saved.save(tmp_path / "r.json")
    assert main(["quantize", "--recipe", str(tmp_path / "r.json")]) == 0
    line = f"quantize --recipe {tmp_path}/r.json --bits 2 --nsamples 8 --lr sde=2e-3 --set sde.lead=8 --out p"
    assert main(line.split()) == 0
    assert ran[0] == saved
    assert ran[1].scheme == Scheme.parse("W2A16g64")
    assert (ran[1].model, ran[1].out, ran[1].trust_remote_code) == ("m", "p", True)
    assert (ran[1].calib.nsamples, ran[1].calib.seqlen) == (8, 512)
    assert ran[1].tune.rates == {"sde": 2e-3, "lwc": 1e-2}
    assert ran[1].options == {"sde": {"band": 2, "lead": 8}}


def test_effort(ran: list[Any], tmp_path: Path) -> None:
    plain = Recipe(model="m", out="o")
    for name in EFFORTS:
        assert main(["quantize", "--model", "m", "--out", "o", "--effort", name]) == 0
        assert ran.pop() == with_effort(plain, name)
    assert main("quantize --model m --out o --effort best --steps 7 --set e2e.norms=false".split()) == 0
    best = with_effort(plain, "best")
    assert ran.pop() == replace(
        best,
        tune=replace(best.tune, steps=7),
        options={**best.options, "e2e": {**best.options["e2e"], "norms": False}},
    )
    replace(plain, method="lwc+sde", options={"sde": {"band": 2}}, seed=3).save(tmp_path / "r.json")
    assert main(["quantize", "--recipe", str(tmp_path / "r.json"), "--effort", "light"]) == 0
    assert ran.pop() == replace(with_effort(plain, "light"), seed=3)


def test_every_effort_can_be_composed_and_the_default_is_one() -> None:
    plain = Recipe(model="m", out="o")
    assert with_effort(plain, "default") == plain
    for effort in EFFORTS.values():
        assert compose(effort.method, options=effort.options).learns


def test_per_channel_and_scheme(ran: list[Any]) -> None:
    assert main("quantize --model m --group-size -1".split()) == 0
    assert main("quantize --model m --scheme w3a16g64_sym --bits 3 --sym --group-size=64".split()) == 0
    assert [str(made.scheme) for made in ran] == ["W4A16", "W3A16g64_sym"]


def test_dry_run(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("quantize --model m --nsamples 9 --dry-run".split()) == 0
    assert ran == []
    assert capsys.readouterr() == ("about 9 samples\n", "")
    assert main("quantize --model m --method rtn --nsamples 9 --dry-run".split()) == 0
    assert capsys.readouterr().err == "Not used by this run of rtn: --nsamples.\n"
    assert main("quantize --model m --dataset a.txt --eval-dataset ./a.txt --dry-run".split()) == 0
    assert capsys.readouterr().err == "Measured on ./a.txt, which it saw before: expect more loss on others.\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("quantize", "--model is missing"),
        ("quantize folder", "(folder): name what it is, as in --model FOLDER."),
        ("quantize --model m --bits 9", "choose 2 to 8"),
        ("quantize --model m --bits four", "--bits"),
        ("quantize --model m --bitss 4", "--bits"),
        ("quantize --model m --scheme W3A16g64 --bits 4", "--bits 4 says otherwise"),
        ("quantize --model m --scheme W3A16g64 --group-size 32", "--group-size 32 says otherwise"),
        ("quantize --model m --scheme W3A16g64 --sym", "asymmetric, and --sym says otherwise"),
        ("quantize --model m --scheme W3A16_sym --asym", "one scale per channel, symmetric, and --asym"),
        ("quantize --model m --scheme W4A8", "8-bit activations"),
        ("quantize --model m --scale-dtype fp8", "scale dtype 'fp8'"),
        ("quantize --model m --blocks 8", "write it like 0:8"),
        ("quantize --model m --lr fast", "write it like sde=3e-3"),
        ("quantize --model m --set band=2", "write it like sde.band=16"),
        ("quantize --model m --effort bset", "effort 'bset' is unknown (did you mean 'best'?)"),
        ("quantize --model m --effort best --method lwc", "--method lwc another: give one of the two"),
        ("quantize --model m --device tpu", "choose auto, cpu or cuda"),
        ("quantize --model m --format ,", "--format ',' names nothing"),
        ("export m --format dense --push-to-hub=", "--push-to-hub names no repository"),
        ("quantize --model m --nsamples 0", "calib.nsamples=0 is too small"),
        ("quantize --recipe nowhere.json", "No such file"),
        ("quantise --model m", "Did you mean 'quantize'?"),
        ("evaluate", "Missing argument 'path'"),
        ("evaluate m --windows 0", "greater than or equal to 1"),
    ],
)
def test_refusals(ran: list[Any], capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    assert says in refused(capsys, *line.split())
    assert ran == []


def test_errors_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, ran: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(recipe: Recipe) -> None:
        raise UserError(f"model {recipe.model!r} is not here: give a path.")

    def stop(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    def ask_for_too_much(recipe: Recipe) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes.")

    def break_down(recipe: Recipe) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["makeweight.pipeline"], "quantize", refuse)
    assert refused(capsys, "quantize", "--model", "m") == "makeweight: model 'm' is not here: give a path.\n"
    monkeypatch.setattr(sys.modules["makeweight.pipeline"], "quantize", stop)
    assert main(["quantize", "--model", "m"]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.setattr("makeweight.export.manifest.check", stop)
    assert main(["verify", "."]) == 130
    assert capsys.readouterr().err == "makeweight: stopped.\n", "nothing but a run resumes"
    monkeypatch.setattr(sys.modules["makeweight.pipeline"], "quantize", ask_for_too_much)
    assert "memory ran out: give the same command where more is free" in refused(capsys, "quantize", "--model", "m")
    monkeypatch.setattr(sys.modules["makeweight.pipeline"], "quantize", break_down)
    with pytest.raises(ZeroDivisionError):
        main(["quantize", "--model", "m"])


def test_evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def found(names: tuple[str, ...], **more: float) -> list[SimpleNamespace]:
        same = {"perplexity": 20.4321, "windows": 12, "tokens": 24564, "seconds": 3.21}
        return [SimpleNamespace(dataset=name, **(same | more)) for name in names]

    def measure(path: str, *, progress: Any, **options: Any) -> list[SimpleNamespace]:
        progress(1, 2)
        asked.append((path, options))
        return found(options["datasets"])

    def both(path: str, original: str, texts: SimpleNamespace, progress: Any) -> tuple[list[SimpleNamespace], ...]:
        results = found(texts.datasets, divergence=0.12345, same_top=0.876)
        return results, found(texts.datasets, perplexity=len(path + original))

    names = {"evaluate": measure, "compare": both, "Texts": SimpleNamespace, "Perplexity": SimpleNamespace}
    stand_in(monkeypatch, "makeweight.evals.perplexity", **names)
    assert main("evaluate folder --dataset [a] --dataset b.txt --windows 12 --device cpu".split()) == 0
    wanted = {"datasets": ("[a]", "b.txt"), "seqlen": 2048, "windows": 12, "device": "cpu", "trust_remote_code": False}
    assert asked == [("folder", wanted)]
    out = capsys.readouterr().out
    assert "[a]" in out and "20.432" in out and "24564" in out
    assert main(["evaluate", "org/name"]) == 0
    assert asked[1][1]["datasets"] == ("python-docs",)
    capsys.readouterr()
    assert main("evaluate folder --against first --dataset b.txt".split()) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("20.432", "11.000", "0.1235", "87.6 %"))


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    description = {
        "family": "llama",
        "blocks": 30,
        "linears": [{"name": "self_attn.q_proj", "out": 576, "in": 576}],
        "parameters": {"total": 135},
        "tied_embeddings": True,
        "group_sizes": [16, 32],
        "edges": [],
    }
    stand_in(monkeypatch, "makeweight.models.load", open_checkpoint=lambda path, trust_remote_code: path)
    stand_in(monkeypatch, "makeweight.models.inspect", describe=lambda checkpoint: description)
    stand_in(monkeypatch, "makeweight.plan", fits=lambda asked: {"lwc": None, "let": "it has no edges"})
    assert main(["inspect", "folder"]) == 0
    out = capsys.readouterr().out
    for words in ("llama", "self_attn.q_proj", "total: 135", "yes", "16, 32", "none", "fits", "it has no edges"):
        assert words in out


def test_methods(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = SimpleNamespace(stage=SimpleNamespace(name="WEIGHT"), summary="a band", source="arXiv 2407.15508")
    stand_in(monkeypatch, "makeweight.methods.presets", zoo=lambda: {"sde": row}, COMPOSED={})
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "sde" in out and "weight" in out and "arXiv 2407.15508" in out


def test_demo(ran: list[Any]) -> None:
    assert main(["demo"]) == 0
    assert main(["demo", "--output_dir", "there"]) == 0
    assert ran == [Path("smollm2-w3"), Path("there")]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("quantize", "evaluate", "inspect", "methods", "demo"))
    assert main(["quantize", "-h"]) == 0
    assert "--group-size" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"makeweight {__version__}\n"


def test_normalize() -> None:
    words = "quantize --group_size 64 --eval_dataset=my_text.txt my_model --lr a_b=1 -- --x_y".split()
    wanted = "quantize --group-size 64 --eval-dataset=my_text.txt my_model --lr a_b=1 -- --x_y".split()
    assert normalize(words) == wanted


def test_help_needs_nothing_heavy() -> None:
    code = "import sys; from makeweight.cli import main; main([]); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": SRC})
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_another_method_leaves_the_settings_of_the_first_behind(ran: list[Any], tmp_path: Path) -> None:
    saved = Recipe.from_json(
        """{"model": "m", "out": "o", "method": "lwc+sde+e2e", "tune": {"rates": {"sde": 1e-3, "lwc": 1e-2}},
        "options": {"e2e": {"steps": 7}, "sde": {"band": 2}}}"""
    )
    saved.save(tmp_path / "r.json")
    assert main(f"quantize --recipe {tmp_path}/r.json --method omniquant+sde --set sde.lead=8 --out p".split()) == 0
    assert ran[0].method == "omniquant+sde"
    assert ran[0].options == {"sde": {"band": 2, "lead": 8}} and ran[0].tune.rates == {"sde": 1e-3, "lwc": 1e-2}
    assert main(f"quantize --recipe {tmp_path}/r.json --method rtn --out p".split()) == 0
    assert (ran[1].options, ran[1].tune.rates) == ({}, {})
