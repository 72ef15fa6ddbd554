"""The sweep behind the default learning rates and the default band: two blocks, 100 steps, held-out block error.

    python -m recipes.rates

Prints each setting's relative error after every block. Resumes where it stopped;
results in benchmarks/results/rates.json.
"""

from __future__ import annotations

from benchmarks.common import WORK, data
from makeweight.models.gguf import demo_model
from makeweight.numerics.scheme import Scheme
from makeweight.recipe import Calib, Eval, Option, Recipe, Tune
from recipes.common import Results, asked

Settings = dict[str, dict[str, Option]]
LWC = 0.2
GRID: list[tuple[str, Settings]] = [
    *(("lwc", {"lwc": {"rate": rate}}) for rate in (0.01, 0.1, 0.2, 0.4)),
    *(
        ("lwc+sde", {"lwc": {"rate": LWC}, "sde": {"band": band, "rate": rate}})
        for band, rate in (
            (0, 1e-3), (0, 3e-3), (0, 1e-2), (256, 1e-2), (256, 5e-3), (256, 2e-2), (64, 1e-2), (16, 1e-2), (2, 1e-2),
            (512, 1e-2),
        )
    ),
]  # fmt: skip


def main() -> None:
    """Run every setting whose result is not there yet, and print all."""
    asked(__doc__)
    results = Results("rates")
    for method, options in GRID:
        name = " ".join([method, *(f"{part}.{key}={v}" for part, given in options.items() for key, v in given.items())])
        recipe = Recipe(
            model=str(demo_model()),
            out=str(WORK / "rates" / name.replace(" ", "-")),
            method=method,
            scheme=Scheme.parse("W3A16g64"),
            blocks=(0, 2),
            calib=Calib(dataset=f"{data()}/enwiki/train.txt", nsamples=48, seqlen=512, piece=512),
            tune=Tune(steps=100, batch_size=2),
            eval=Eval(datasets=()),
            options=options,
        )
        results.run(name, recipe)
        print(f"{name:<40}", *(f"{error:.5f}" for error in results.cells[name]["block_errors"]), flush=True)


if __name__ == "__main__":
    main()
