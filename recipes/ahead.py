"""How far ahead cross-layer learning should look, and how heavily: first 8 blocks of SmolLM2-135M, W4A16 and W3A16g64.

    python -m recipes.ahead

Per channel at 4 bits is where looking ahead helps least, so it decides. Resumes where it stopped; results in
benchmarks/results/ahead.json, the plain cells in ablation.json.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.common import WORK
from recipes.ablation import recipe
from recipes.common import Results, asked

METHOD = "lwc+sde+cl"
SETTINGS: tuple[tuple[str, int, int, float], ...] = (
    ("W4A16", 0, 1, 1.0),
    ("W4A16", 0, 1, 0.3),
    ("W3A16g64", 0, 1, 1.0),
    ("W3A16g64", 0, 1, 0.3),
    ("W4A16", 0, 2, 0.3),
    ("W4A16", 0, 3, 1.0),
)
"""Scheme, seed, blocks ahead, and what each block further on weighs relative to the one before it."""


def main() -> None:
    """Run every setting whose result is not there yet, and print all."""
    asked(__doc__)
    results = Results("ahead")
    for scheme, seed, ahead, decay in SETTINGS:
        name = f"{scheme}/{METHOD}/{seed}/ahead={ahead}/decay={decay}"
        base = recipe(METHOD, scheme, seed)
        wanted = replace(
            base, out=str(WORK / "ahead" / name.replace("/", "-")), options={"cl": {"ahead": ahead, "decay": decay}}
        )
        results.run(name, wanted)
        cell = results.cells[name]
        print(f"{name:<48} {cell['wikitext2']:8.3f} {cell['enwiki']:8.3f}", flush=True)


if __name__ == "__main__":
    main()
