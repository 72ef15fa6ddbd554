"""Which runs there are: ours first, in one place, then theirs; and in which order they are run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from makeweight.effort import EFFORTS
from makeweight.errors import UserError, did_you_mean
from makeweight.numerics.scheme import Scheme

OURS: dict[str, dict[str, Any]] = {
    **{
        f"makeweight-{name}": {
            "method": effort.method,
            "tune": {"steps": effort.steps, "batch_size": effort.batch_size},
            "options": dict(effort.options),
            "calib": {"written": effort.written},
        }
        for name, effort in EFFORTS.items()
    },
    "rtn": {"method": "rtn"},
    "lwc": {"method": "lwc", "tune": {"steps": 200, "batch_size": 2}},
    "lwc+sde+cl": {"method": "lwc+sde+cl", "tune": {"steps": 200, "batch_size": 2}},
    "autoround": {"method": "autoround", "tune": {"steps": 200, "batch_size": 8}, "calib": {"piece": 512}},
}
"""Our runs, the three efforts first: any part of a recipe in its JSON form, by the run's name.

`autoround` is as auto-round is, with which `--speed` compares it: it learns on samples in one piece.
"""

SETTINGS = ("W4A16", "W3A16g64", "W2A16g64")
SMOKE_SETTINGS = ("W2A16g64",)
ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to quantize: a program and its options; `settings` names the only ones that it is run in."""

    program: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = SETTINGS
    note: str = ""

    def shortened(self) -> dict[str, Any]:
        """Return options with which it ends after two steps."""
        if self.program == "makeweight":
            short = {**self.options, "tune": {**self.options.get("tune", {}), "steps": 2}}
            if "e2e" in short["method"].split("+"):
                given = short.get("options", {})
                short["options"] = {**given, "e2e": {**given.get("e2e", {}), "steps": 2}}
            if written := short.get("calib", {}).get("written"):
                short["calib"] = {"written": min(2, written)}
            return short
        return {**self.options, **({"iters": 2} if "iters" in self.options else {})}


THEIRS: dict[str, Run] = {
    "auto-round": Run(program="auto-round", options={"iters": 200}, note="its default: 200 steps of 8 samples"),
    "llm-compressor-gptq": Run(program="llm-compressor", options={"method": "gptq"}),
    "gptqmodel": Run(
        program="gptqmodel", note="its GPTQ by default; the last release that runs on the torch of all others"
    ),
    "auto-round-light": Run(
        program="auto-round", options={"iters": 50, "lr": 5e-3}, note="its recipe `light`: 50 steps, rate 0.005"
    ),
    "llm-compressor-awq": Run(program="llm-compressor", options={"method": "awq"}),
    "auto-round-neuqi": Run(
        program="auto-round",
        options={"iters": 200, "enable_neuqi": True},
        note="scales and zero-points searched first, then 200 steps of rounding",
    ),
    "auto-round-ext": Run(
        program="auto-round",
        options={"iters": 200, "enable_alg_ext": True, "sym": True},
        settings=("W2A16g64",),
        note="its algorithm extension, which acts on symmetric grids alone, with the default's 200 steps",
    ),
    "hqq": Run(program="hqq", note="needs no calibration; its zero-points are floats, all others' are integers"),
    "auto-round-best": Run(
        program="auto-round",
        options={"iters": 1000},
        settings=("W2A16g64",),
        note="its recipe `best`, 1000 steps, but on the 128 x 512 tokens that all have in place of 512 x 2048",
    ),
    "auto-round-best-ext": Run(
        program="auto-round",
        options={"iters": 1000, "enable_alg_ext": True, "sym": True},
        settings=("W2A16g64",),
        note="what it advises for 2 bits: 1000 steps with that extension; on as few tokens as `auto-round-best`",
    ),
}

RUNS: dict[str, Run] = {
    **{name: Run(program="makeweight", options=options) for name, options in OURS.items()},
    **THEIRS,
}


def note_on(name: str) -> str:
    """Say what a run stands for; one of ours that is named after its method needs no word."""
    effort = EFFORTS.get(name.removeprefix("makeweight-"))
    if effort is None:
        return RUNS[name].note
    from makeweight.plan import compose  # brings torch, which the process that measures does without

    last = compose(effort.method, options=effort.options).finetune
    then = "" if last is None else f", then {last.steps} of {last.batch_size} for the whole network"
    more = f", on {effort.written} more samples that the model wrote itself" if effort.written else ""
    settings = {f"{of}.{name}": value for of, given in effort.options.items() for name, value in given.items()}
    rest = ", ".join(f"`{name}={value}`" for name, value in settings.items() if name != "e2e.steps")
    how = f" ({rest})" if rest else ""
    return f"`{effort.method}`{how}, {effort.steps} steps of {effort.batch_size} samples for each block{then}{more}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell to fill: a run in a setting; the original model, in none, is neither."""

    name: str
    setting: str = ""
    run: Run | None = None


def entries(settings: Iterable[str] = SETTINGS, runs: Sequence[str] = ()) -> list[Entry]:
    """Return the cells in the order in which they are run: the original, then each setting, ours and theirs in turn.

    `runs` chooses some. Raises UserError for an unknown run, a scheme that is none of a race's, and an empty choice.
    """
    for name in runs:
        if name not in RUNS:
            raise UserError(f"run {name!r} is unknown{did_you_mean(name, RUNS)}: choose among {', '.join(RUNS)}.")
    found = [
        Entry(name=f"{setting}/{name}", setting=setting, run=RUNS[name])
        for setting in map(_checked, settings)
        for name in _alternating(OURS, THEIRS)
        if (not runs or name in runs) and (setting in RUNS[name].settings or setting not in SETTINGS)
    ]
    if not found:
        raise UserError("no run is left: some are for certain settings only, such as auto-round-best for W2A16g64.")
    return [Entry(name=ORIGINAL), *found]


def _alternating(first: Iterable[str], second: Iterable[str]) -> Iterator[str]:
    return (name for name in chain.from_iterable(zip_longest(first, second)) if name is not None)


def _checked(setting: str) -> str:
    scheme = Scheme.parse(setting)
    if scheme.symmetric or scheme.activations != 16:
        raise UserError(f"setting {setting!r} is not raced: give an asymmetric one for weights alone, as in W3A16g64.")
    return str(scheme)
