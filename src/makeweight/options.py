"""From the words of a command line to a recipe: each option that was given replaces one field."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import typer

from makeweight.effort import with_effort
from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme
from makeweight.paths import expanded
from makeweight.recipe import Eval, Option, Recipe

T = TypeVar("T")


def misread(error: typer.TyperException, words: Sequence[str]) -> str:
    """Say in one sentence what a command line has wrong, and of an option's value which."""
    said = error.format_message().rstrip(".")
    if isinstance(error, typer.BadParameter) and error.param is not None:
        option, value = _last(words, error.param.opts)
        if value and not re.fullmatch(r"[+-]?\d+", value):  # all other values are taken as they are
            return f"{option} {value} is not a whole number: give one."
        if value:
            return f"{option} {value}: {error.message[:1].lower()}{error.message[1:]}."
    if words[0] == "quantize" and "extra argument" in said:
        said += ": name what it is, as in --model FOLDER"
    return said if said.endswith("?") else f"{said}."


def _last(words: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """Return the last of some options that was given, and its value, which may be a word of its own."""
    found = "", ""
    for word, behind in zip(words, (*words[1:], ""), strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            found = name, value if equals else behind
    return found


def start(model: str | None, out: str | None, scheme: Scheme) -> Recipe:
    """Begin a recipe from the command line alone; without --out the folder is named after model and scheme."""
    if model is None:
        raise UserError("--model is missing: name a Hugging Face folder, a hub name or a GGUF file.")
    path = expanded(model)  # a folder may be called . or .., and a link keeps its own name
    name = Path(os.path.abspath(path) if path.is_dir() else model.rstrip("/")).name.removesuffix(".gguf") or "model"
    return Recipe(model=model, out=out or f"{name}-{scheme}".lower())


def at_effort(base: Recipe, effort: str | None, method: str | None) -> Recipe:
    """Begin from an effort where one is named; it chooses the method, so that none can be named beside it."""
    if effort is None:
        return base
    if method is not None:
        raise UserError(f"--effort {effort} chooses a method, and --method {method} another: give one of the two.")
    return with_effort(base, effort)


def by_method(base: Recipe, method: str | None) -> Recipe:
    """Name another method where one is given, and leave out a recipe's settings of methods that are not in it."""
    if method is None:
        return base
    from makeweight.plan import parts_of

    inside = parts_of(method)
    rates = {name: rate for name, rate in base.tune.rates.items() if name in inside}
    settings = {name: given for name, given in base.options.items() if name in inside}
    return replace(base, method=method, tune=replace(base.tune, rates=rates), options=settings)


def changed(base: T, **changes: Any) -> T:
    """Replace what was given on the command line and keep the rest."""
    return replace(base, **{name: value for name, value in changes.items() if value is not None})  # pyright: ignore[reportReturnType, reportArgumentType]


def remark(recipe: Recipe) -> None:
    """Print which options change nothing in what a recipe runs, what learns nothing, and which figures flatter."""
    from makeweight.plan import compose, seen, unused

    if found := unused(recipe):
        print(f"Not used by this run of {recipe.method}: {', '.join(found)}.", file=sys.stderr)
    if not recipe.tune.steps and compose(recipe.method).learns:
        print("With --steps 0 no block learns anything.", file=sys.stderr)
    if known := seen(recipe):
        print(f"Measured on {' and '.join(known)}, which it saw before: expect more loss on others.", file=sys.stderr)


def grid(
    base: Scheme, text: str | None, bits: int | None, group_size: int | None, sym: bool | None, dtype: str | None
) -> Scheme:
    """Read a scheme from its shorthand, from its parts, or from both where they agree."""
    changes: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": sym, "scale_dtype": dtype}
    if text is None:
        return changed(base, **changes)
    named = changed(Scheme.parse(text, scale_dtype=base.scale_dtype), scale_dtype=dtype)
    flags = {
        "bits": f"--bits {bits}",
        "group_size": f"--group-size {group_size}",
        "symmetric": "--sym" if sym else "--asym",
    }
    for name, flag in flags.items():
        if changes[name] is not None and changes[name] != getattr(named, name):
            raise UserError(f"--scheme {text} means {named.words()}, and {flag} says otherwise: give one of the two.")
    return named


def names(given: list[str] | None) -> tuple[str, ...] | None:
    """Read names, given one by one."""
    return tuple(given) if given else None


def evaluated(given: list[str] | None, *, no_eval: bool) -> tuple[str, ...] | None:
    """Read the texts to evaluate on: none of them with --no-eval, and None where neither says anything."""
    if no_eval and given:
        raise UserError("--no-eval and --eval-dataset say opposite things: give one of the two.")
    return () if no_eval else names(given)


def evaluation(base: Eval, texts: tuple[str, ...] | None, windows: int | None, seqlen: int | None) -> Eval:
    """Change what is evaluated; counts of windows for each text are for the texts that they were given with."""
    if texts not in (None, base.datasets) and windows is None and isinstance(base.windows, tuple):
        base = replace(base, windows=None)
    return changed(base, datasets=texts, windows=windows, seqlen=seqlen)


def words(given: list[str] | None) -> tuple[str, ...] | None:
    """Read names, given one by one or joined by commas."""
    if not given:
        return None
    found = tuple(word.strip() for item in given for word in item.split(",") if word.strip())
    if not found:
        raise UserError(f"--format {','.join(given)!r} names nothing: give names such as gptq,gguf, or leave it out.")
    return found


def rates(base: Recipe, given: list[str] | None, option: list[str] | None) -> dict[str, float] | None:
    """Add learning rates, each written as name=value, to a recipe's own, but for those that `option` (--set) sets."""
    named = dict(map(parse_rate, given or ()))
    set_too = {method for method, name, _ in map(parse_option, option or ()) if name == "rate"}
    if twice := sorted(set_too & named.keys()):
        raise UserError(f"--lr {twice[0]} and --set {twice[0]}.rate say the same thing: give one of the two.")
    kept = {name: rate for name, rate in base.tune.rates.items() if name not in set_too}
    return {**kept, **named} if given or set_too else None


def settings(base: Recipe, given: list[str] | None) -> dict[str, dict[str, Option]] | None:
    """Add settings, each written as method.option=value, to a recipe's own."""
    if not given:
        return None
    found = {method: dict(values) for method, values in base.options.items()}
    for method, name, value in map(parse_option, given):
        found.setdefault(method, {})[name] = value
    return found


def parse_option(text: str) -> tuple[str, str, Option]:
    """Read "method.option=value": the value is true, false, a number, or else a word."""
    match = re.fullmatch(r"([\w-]+)\.([\w-]+)=(.+)", text.strip())
    if match is None:
        raise UserError(f"setting {text!r} is not understood: write it like sde.band=16.")
    method, name, word = match.groups()
    if word.lower() in ("true", "false"):
        return method, name.replace("-", "_"), word.lower() == "true"
    for kind in (int, float):
        try:
            return method, name.replace("-", "_"), kind(word)
        except ValueError:
            continue
    return method, name.replace("-", "_"), word


def parse_rate(text: str) -> tuple[str, float]:
    """Read "name=value", the learning rate of a method."""
    name, _, word = text.partition("=")
    try:
        rate = float(word)
    except ValueError:
        rate = math.nan
    if not name.strip() or not math.isfinite(rate):
        raise UserError(f"learning rate {text!r} is not understood: write it like sde=3e-3.")
    return name.strip(), rate
