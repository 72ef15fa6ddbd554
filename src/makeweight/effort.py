"""Three points of the trade between time and accuracy: what `--effort` stands for.

README has what was measured of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from makeweight.errors import UserError, did_you_mean
from makeweight.recipe import Calib, Option, Recipe, Tune


@dataclass(frozen=True, kw_only=True)
class Effort:
    """A method with its settings, its steps per block, and how many calibration samples the model writes itself."""

    method: str
    steps: int
    batch_size: int
    options: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)
    written: int = 0


EFFORTS: dict[str, Effort] = {
    "light": Effort(method=Recipe.method, steps=60, batch_size=2, options={"e2e": {"steps": 50}}),
    "default": Effort(method=Recipe.method, steps=Tune.steps, batch_size=Tune.batch_size),
    "best": Effort(
        method="flipround+cl+e2e",
        steps=800,
        batch_size=2,
        options={"flipround": {"rate": 10.0}, "e2e": {"steps": 600}},
        written=Calib.nsamples,
    ),
}


def with_effort(recipe: Recipe, name: str) -> Recipe:
    """Return a recipe with the method, the steps, the settings and the written samples of an effort; all else stays.

    `name` is `light`, `default` or `best`; raises UserError for any other.
    """
    if name not in EFFORTS:
        raise UserError(f"effort {name!r} is unknown{did_you_mean(name, EFFORTS)}: choose light, default or best.")
    chosen = EFFORTS[name]
    tune = replace(recipe.tune, steps=chosen.steps, batch_size=chosen.batch_size, rates={})
    calib = replace(recipe.calib, written=chosen.written)
    return replace(recipe, method=chosen.method, tune=tune, options=chosen.options, calib=calib)
