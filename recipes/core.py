"""The whole of SmolLM2-135M at W3A16g64, calibrated on 128 x 512 tokens: methods from round-to-nearest on.

Clipping alone and with SDE and CL; benchmarks.peers has the whole model by learned rounding.

    python -m recipes.core

Resumes where it stopped, within a model too.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.common import WORK, data, evaluation
from makeweight.models.gguf import demo_model
from makeweight.numerics.scheme import Scheme
from makeweight.recipe import Calib, Recipe, Tune
from recipes.common import Results, asked

METHODS = ("rtn", "lwc", "lwc+sde+cl")


def recipe(method: str) -> Recipe:
    """Return one row of the table."""
    return Recipe(
        model=str(demo_model()),
        out=str(WORK / "core" / method),
        method=method,
        scheme=Scheme.parse("W3A16g64"),
        calib=Calib(dataset=f"{data()}/enwiki/train.txt", nsamples=128, seqlen=512),
        tune=Tune(steps=200, batch_size=2),
        eval=replace(evaluation(), baseline=True),
    )


def main() -> None:
    """Run every row whose result is not there yet."""
    asked(__doc__)
    results = Results("core")
    for method in METHODS:
        results.run(method, recipe(method))


if __name__ == "__main__":
    main()
