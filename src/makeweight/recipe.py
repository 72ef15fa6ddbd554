"""What a run is: frozen, validated at construction, and JSON both ways.

A recipe read back from its own JSON equals the recipe, and equal recipes write equal bytes. Nothing heavy is
imported here; whether a method exists or fits the model is for `plan` to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from makeweight.errors import UserError, did_you_mean
from makeweight.numerics.scheme import MIN_BITS, Scheme
from makeweight.paths import expanded

Option = float | int | bool | str
T = TypeVar("T")
MOST = 2**31
"""The largest whole number of a recipe: no count comes near it, and what computes with it would not take more."""


@dataclass(frozen=True, kw_only=True)
class Calib:
    """The text the blocks are fitted to: `nsamples` sequences of `seqlen` tokens from `dataset`.

    `written` is how many more the model writes itself. Blocks learn on pieces of at most `piece` tokens: all of a
    piece attend to its first token, and few samples have few first tokens (LOG.md). The whole network learns on whole
    samples: errors of attention grow with what is attended to.
    """

    dataset: str = "pile-10k"
    nsamples: int = 128
    seqlen: int = 2048
    written: int = 0
    piece: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", _text("calib.dataset", self.dataset))
        _whole("calib.nsamples", self.nsamples, least=1)
        _whole("calib.seqlen", self.seqlen, least=2)
        _whole("calib.written", self.written, least=0)
        _whole("calib.piece", self.piece, least=2)

    @property
    def samples(self) -> int:
        """All sequences."""
        return self.nsamples + self.written

    @property
    def pieces(self) -> int:
        """How many equal pieces a sequence is cut into."""
        return min(-(-self.seqlen // self.piece), self.seqlen // 2)


@dataclass(frozen=True, kw_only=True)
class Tune:
    """The optimiser: `steps` per block of `batch_size` samples, with `checks` comparisons against the best state.

    `dtype` is that of the forward pass; "auto" is bfloat16, and float32 where a device has no units for it.
    `rates` overrides the learning rates of methods by name, as in {"sde": 3e-3}.
    """

    steps: int = 240
    batch_size: int = 2
    checks: int = 5
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _whole("tune.steps", self.steps, least=0)
        _whole("tune.batch_size", self.batch_size, least=1)
        _whole("tune.checks", self.checks, least=1)
        _one_of("tune.dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _one_of("tune.device", self.device, ("auto", "cpu", "cuda"))
        rates = _mapping("tune.rates", self.rates)
        object.__setattr__(self, "rates", {name: _rate(f"tune.rates.{name}", rate) for name, rate in rates.items()})


@dataclass(frozen=True, kw_only=True)
class Eval:
    """What the written files are measured on: the first `windows` windows of `seqlen` tokens of each text.

    `windows` is one number for all, one for each text, or None for the whole of each.
    The default texts are two domains that ship inside CPython, so that every report has them without a network.
    """

    datasets: tuple[str, ...] = ("python-docs", "python-code")
    seqlen: int = 2048
    windows: int | tuple[int, ...] | None = None
    baseline: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.datasets, tuple | list):
            raise UserError(f"eval.datasets={self.datasets!r} is not a list: give the names in brackets.")
        object.__setattr__(self, "datasets", tuple(_text("eval.datasets", name) for name in self.datasets))
        _whole("eval.seqlen", self.seqlen, least=2)
        if isinstance(self.windows, tuple | list):
            object.__setattr__(self, "windows", tuple(self.windows))
            if len(self.windows) != len(self.datasets):
                raise UserError(f"eval.windows={self.windows!r} does not fit {len(self.datasets)} texts: one each.")
        for count in self.windows if isinstance(self.windows, tuple) else (self.windows,):
            if count is not None:
                _whole("eval.windows", count, least=1)
        _flag("eval.baseline", self.baseline)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run writes.

    `blocks` is a half-open range of blocks to quantize (None: all), `options` overrides settings of methods by name,
    as in {"sde": {"band": 16}}. `formats` are written beside `out`, which itself is compressed-tensors.
    """

    model: str
    out: str
    method: str = "flipround+e2e"
    scheme: Scheme = field(default_factory=Scheme)
    blocks: tuple[int, int] | None = None
    calib: Calib = field(default_factory=Calib)
    tune: Tune = field(default_factory=Tune)
    eval: Eval = field(default_factory=Eval)
    seed: int = 0
    options: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "method", "out"):
            object.__setattr__(self, name, _text(name, getattr(self, name)))
        for name, kind in (("scheme", Scheme), ("calib", Calib), ("tune", Tune), ("eval", Eval)):
            if not isinstance(getattr(self, name), kind):
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not a {kind.__name__}: build one, as in {kind.__name__}()."
                )
        if self.blocks is not None:
            object.__setattr__(self, "blocks", _range(self.blocks))
        _whole("seed", self.seed, least=0, most=2**63 - 1)
        if not isinstance(self.formats, tuple | list):
            raise UserError(f"formats={self.formats!r} is not a list: give the names in brackets.")
        for name in self.formats:
            _text("formats", name)
        object.__setattr__(self, "formats", tuple(self.formats))
        _flag("trust_remote_code", self.trust_remote_code)
        options = _mapping("options", self.options)
        options = {name: _mapping(f"options.{name}", given) for name, given in options.items()}
        for name, given in options.items():
            for key, value in given.items():
                _option(f"options.{name}.{key}", value)
        object.__setattr__(self, "options", options)

    def to_json(self) -> str:
        """Return the recipe as indented JSON with sorted keys."""
        data = asdict(self)
        data["blocks"] = None if self.blocks is None else f"{self.blocks[0]}:{self.blocks[1]}"
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "the recipe", **given: str | None) -> Recipe:
        """Read what `to_json` wrote, or a part of it: what is left out has its default, what is given comes first.

        `scheme` may be shorthand such as "W3A16g64". Raises UserError on anything unknown or of the wrong kind.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{source} is not JSON: {error.msg} in line {error.lineno}.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source} cannot be read as JSON ({error}).") from None
        data = _mapping(source, data) | {name: value for name, value in given.items() if value is not None}
        scheme = data.get("scheme")
        if isinstance(scheme, str):
            data["scheme"] = Scheme.parse(scheme)
        elif scheme is not None:
            data["scheme"] = _scheme(scheme)
        for name, kind in (("calib", Calib), ("tune", Tune), ("eval", Eval)):
            if name in data:
                data[name] = _build(kind, data[name], name)
        if isinstance(data.get("blocks"), str):
            data["blocks"] = parse_blocks(data["blocks"])
        return _build(cls, data, source)

    def save(self, path: Path | str) -> None:
        """Write the recipe as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, **given: str | None) -> Recipe:
        """Read a recipe from a JSON file, as `from_json` does; raises UserError where there is none or it is wrong."""
        try:
            text = expanded(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
            raise UserError(f"recipe {str(path)!r} cannot be read: {reason}.") from None
        return cls.from_json(text, source=f"recipe {str(path)!r}", **given)


def parse_blocks(text: str) -> tuple[int, int]:
    """Read a half-open range of blocks: "0:8" is the first eight."""
    match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
    if match is None:
        raise UserError(f"blocks {text!r} is not a range: write it like 0:8 for the first eight blocks.")
    return _range((int(match[1]), int(match[2])))


def _build(kind: type[T], given: object, where: str) -> T:
    """Make a dataclass from JSON, refusing unknown keys and naming missing ones."""
    data = _mapping(where, given)
    known = {item.name: item for item in fields(kind)}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in known:
            near = did_you_mean(key, known)
            raise UserError(
                f"{where} has an unknown key {key!r}{near}: leave it out, or use the version that wrote it."
            )
    for name, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and name not in data:
            raise UserError(f"{where} does not say {name!r}, which has no default.")
    return kind(**data)


def _scheme(given: object) -> Scheme:
    """Check kinds before `Scheme` compares values: its own checks assume numbers."""
    data = _mapping("scheme", given)
    for key, least in (("bits", MIN_BITS), ("group_size", -1), ("activations", 1)):
        if key in data:
            _whole(f"scheme.{key}", data[key], least=least)
    if "symmetric" in data:
        _flag("scheme.symmetric", data["symmetric"])
    return _build(Scheme, data, "scheme")


def _range(value: object) -> tuple[int, int]:
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(type(end) is int for end in value)):
        raise UserError(f"blocks={value!r} is not a range: give the first block and the one after the last.")
    first, end = value
    if not 0 <= first < end:
        raise UserError(f"blocks {first}:{end} is empty: the end must be larger than the start, as in 0:8.")
    return first, end


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{name} is {value!r}, which is not a table of names and values.")
    return dict(sorted(value.items()))


def _whole(name: str, value: object, *, least: int, most: int = MOST) -> None:
    if type(value) is not int:
        raise UserError(f"{name}={value!r} is not a whole number.")
    if value < least:
        raise UserError(f"{name}={value} is too small: give {least} or more.")
    if value > most:
        raise UserError(f"{name}={value} is too large: give {most} or less.")


def _rate(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    raise UserError(f"{name}={value!r} is not a rate: give a number that is not negative.")


def _option(name: str, value: object) -> None:
    if not isinstance(value, float | int | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{name}={value!r} is not possible: give a number, a word, true or false.")


def _flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise UserError(f"{name}={value!r} is neither true nor false.")


def _text(name: str, value: object) -> str:
    value = str(value) if isinstance(value, PathLike) else value
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}={value!r} is empty or not text: name one.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}={value!r} is not UTF-8, as a recipe has to be: give it another name.") from None
    return value


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown: choose {', '.join(choices[:-1])} or {choices[-1]}.")
