"""What sde and cl add to other methods: hosts alone and with them, on the first 8 blocks of SmolLM2-135M.

    python -m recipes.hosts [HOST ...]

The protocol is that of recipes.ablation, at W3A16g64 and W2A16g64; three seeds for the hosts in SEEDS, one for the
rest. A host that learns nothing has nothing for cl to judge: such cells do not exist. Cells that recipes.ablation has
are taken from there. Resumes where it stopped, and several may run at once with different hosts; results in
benchmarks/results/hosts.json, and the table of what is there is printed at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.common import WORK, evaluation, table
from makeweight.plan import compose
from recipes.ablation import recipe
from recipes.common import Results, asked

RANGES = ("lwc", "omniquant", "awq", "gptq")
"""Hosts that learn ranges or scales at most."""
LEARNING = ("autoround", "flipround", "efficientqat")
ADDED = ("", "+sde", "+cl", "+sde+cl")
SCHEMES = ("W3A16g64", "W2A16g64")
SEEDS = {"lwc": (0, 1, 2), "autoround": (0, 1, 2)}
DOMAINS = ("wikitext2", "enwiki")
Cells = Mapping[str, Mapping[str, Any]]


def possible(host: str) -> list[str]:
    """Return what can be added to a host; cl needs something that learns."""
    learns = compose(host).learns
    return [added for added in ADDED if added != "+cl" or learns]


def every_cell(hosts: tuple[str, ...]) -> Iterator[tuple[str, str, str, int]]:
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


def summary(cells: Cells, scheme: str) -> str:
    """Return the table of a scheme: a host and what is added, means over the seeds that all of a row's columns have."""
    rows = []
    for host in (*RANGES, *LEARNING):
        row = {added: seeds for added in ADDED if (seeds := _seeds(cells, host, added, scheme))}
        if not row:
            continue
        common = sorted(set.intersection(*row.values()))
        texts = [_means(cells, host, added, scheme, common) if added in row else "-" for added in ADDED]
        rows.append([f"`{host}`", *texts, str(len(common))])
    header = (f"first 8 blocks, {scheme}, WikiText-2 / enwiki", "alone", *ADDED[1:], "seeds")
    return table([text.replace("+", " + ").strip() for text in header], rows)


def _seeds(cells: Cells, host: str, added: str, scheme: str) -> set[int]:
    return {seed for seed in SEEDS.get(host, (0,)) if name_of(host, added, scheme, seed) in cells}


def _means(cells: Cells, host: str, added: str, scheme: str, seeds: Sequence[int]) -> str:
    found = [cells[name_of(host, added, scheme, seed)] for seed in seeds]
    return " / ".join(f"{fmean(cell[domain] for cell in found):.2f}" for domain in DOMAINS) if found else "-"


def helped(cells: Cells) -> str:
    """Count the runs of hosts that learn neither rounding nor weights in which sde and cl lower both perplexities."""
    pairs = []
    for host, added, scheme, seed in every_cell(RANGES):
        names = [name_of(host, what, scheme, seed) for what in ("", added)]
        if added == ADDED[-1] and all(name in cells for name in names):
            alone, both = (cells[name] for name in names)
            pairs.append(all(both[domain] < alone[domain] for domain in DOMAINS))
    return (
        f"Of {len(pairs)} runs of {', '.join(RANGES)} (method, scheme, seed), {sum(pairs)} end with both perplexities "
        "lower where SDE and CL are added."
    )


def tables(cells: Cells) -> str:
    """Return one table per scheme, of the cells that are there, and what they come to."""
    return "\n\n".join([*(summary(cells, scheme) for scheme in SCHEMES), helped(cells)])


def main() -> None:
    """Run every cell whose result is not there yet, and print the tables."""
    hosts = tuple(asked(__doc__, "HOST")) or (*RANGES, *LEARNING)
    results, shared = Results("hosts"), Results("ablation").cells
    for host, added, scheme, seed in every_cell(hosts):
        name = name_of(host, added, scheme, seed)
        if name in shared and results.cells.get(name) != shared[name]:
            results.keep(name, shared[name])
        out = str(WORK / "hosts" / name.replace("/", "-"))
        # Nothing here needs the original's predictions, which would double the time of evaluating.
        results.run(name, replace(recipe(f"{host}{added}", scheme, seed), out=out, eval=evaluation()))
    print(tables(results.cells))


if __name__ == "__main__":
    main()
