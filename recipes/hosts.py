"""What sde and cl add to other methods: hosts alone and with them, on the first 8 blocks of SmolLM2-135M.

    python -m recipes.hosts [HOST ...]

The protocol is that of recipes.ablation, at W3A16g64 and W2A16g64; three seeds for the hosts in SEEDS, one for the
rest. A host that learns nothing has nothing for cl to judge: such cells do not exist. Cells that recipes.ablation has
are taken from there. Resumes where it stopped; results in benchmarks/results/hosts.json, and the table of what is
there is printed at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.common import WORK, table
from makeweight.plan import compose
from recipes.ablation import recipe
from recipes.common import Results

CLIPPING = ("lwc", "omniquant", "awq", "gptq")
LEARNING = ("autoround", "efficientqat")
ADDED = ("", "+sde", "+cl", "+sde+cl")
SCHEMES = ("W3A16g64", "W2A16g64")
SEEDS = {"lwc": (0, 1, 2), "autoround": (0, 1, 2)}
DOMAINS = ("wikitext2", "enwiki")


def possible(host: str) -> list[str]:
    """Return what can be added to a host; cl needs something that learns."""
    learns = compose(host).learns
    return [added for added in ADDED if added != "+cl" or learns]


def cells(hosts: tuple[str, ...]) -> Iterator[tuple[str, str, str, int]]:
    """Yield host, what is added, scheme and seed, all of seed 0 first."""
    for seed in range(3):
        for scheme in SCHEMES:
            for host in hosts:
                if seed in SEEDS.get(host, (0,)):
                    for added in possible(host):
                        yield host, added, scheme, seed


def name_of(host: str, added: str, scheme: str, seed: int) -> str:
    """Name a cell."""
    return f"{scheme}/{host}{added}/{seed}"


def summary(results: Results, scheme: str) -> str:
    """Return the table of a scheme: WikiText-2 / enwiki for each host and what is added, means over the same seeds."""
    rows = []
    for host in (*CLIPPING, *LEARNING):
        row = [f"`{host}`"]
        for added in ADDED:
            names = [name_of(host, added, scheme, seed) for seed in SEEDS.get(host, (0,))]
            found = [results.cells[name] for name in names if name in results.cells]
            means = [sum(cell[domain] for cell in found) / len(found) for domain in DOMAINS] if found else []
            row.append(" / ".join(f"{mean:.2f}" for mean in means) or "-")
        rows.append(row)
    return table((scheme, "alone", *(added.replace("+", " + ").strip() for added in ADDED[1:])), rows)


def helped(results: Results) -> str:
    """Count the cells of hosts that clip in which sde and cl together lower both perplexities."""
    pairs = []
    for host, added, scheme, seed in cells(CLIPPING):
        names = [name_of(host, what, scheme, seed) for what in ("", added)]
        if added == ADDED[-1] and all(name in results.cells for name in names):
            alone, both = (results.cells[name] for name in names)
            pairs.append(all(both[domain] < alone[domain] for domain in DOMAINS))
    return f"sde and cl lower both perplexities of a host that clips in {sum(pairs)} of {len(pairs)} cells."


def main() -> None:
    """Run every cell whose result is not there yet, and print the tables."""
    hosts, results, shared = tuple(sys.argv[1:]) or (*CLIPPING, *LEARNING), Results("hosts"), Results("ablation").cells
    for host, added, scheme, seed in cells(hosts):
        name = name_of(host, added, scheme, seed)
        if name in shared and name not in results.cells:
            results.keep(name, shared[name])
        out = str(WORK / "hosts" / name.replace("/", "-"))
        results.run(name, replace(recipe(f"{host}{added}", scheme, seed), out=out))
    print("\n\n".join(summary(results, scheme) for scheme in SCHEMES), helped(results), sep="\n\n")


if __name__ == "__main__":
    main()
