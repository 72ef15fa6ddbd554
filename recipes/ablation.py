"""What each part adds: six methods, two schemes, three seeds, on the first 8 blocks of SmolLM2-135M.

    python -m recipes.ablation [METHOD ...]

Blocks 8 and later stay at full precision, a quarter of the cost of the whole model. Resumes where it stopped, and
several may run at once with different methods.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.common import WORK, data, evaluation
from makeweight.models.gguf import demo_model
from makeweight.numerics.scheme import Scheme
from makeweight.recipe import Calib, Recipe, Tune
from recipes.common import Results, asked

METHODS = ("rtn", "lwc", "lwc+lsi", "lwc+sde", "lwc+cl", "lwc+sde+cl")
SCHEMES = ("W3A16g64", "W4A16")
SEEDS = (0, 1, 2)
BLOCKS = (0, 8)
CALIB = {"nsamples": 48, "seqlen": 512, "piece": 512}
TUNE = Tune(steps=200, batch_size=2)


def recipe(method: str, scheme: str, seed: int) -> Recipe:
    """Return one cell."""
    return Recipe(
        model=str(demo_model()),
        out=str(WORK / "ablation" / f"{method}-{scheme}-{seed}"),
        method=method,
        scheme=Scheme.parse(scheme),
        blocks=BLOCKS,
        calib=Calib(dataset=f"{data()}/enwiki/train.txt", **CALIB),
        tune=TUNE,
        eval=replace(evaluation(), baseline=True),
        seed=seed,
    )


def main() -> None:
    """Run every cell whose result is not there yet, one seed after the other."""
    results, methods = Results("ablation"), asked(__doc__, "METHOD") or METHODS
    for seed in SEEDS:
        for scheme in SCHEMES:
            for method in methods:
                if method != "rtn" or seed == 0:  # nothing in it depends on the seed
                    results.run(f"{scheme}/{method}/{seed}", recipe(method, scheme, seed))


if __name__ == "__main__":
    main()
