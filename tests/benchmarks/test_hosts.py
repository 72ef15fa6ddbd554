from __future__ import annotations

from recipes.hosts import helped, summary


def cell(wikitext2: float, enwiki: float = 1.0) -> dict[str, float]:
    return {"wikitext2": wikitext2, "enwiki": enwiki}


CELLS = {
    "W3A16g64/lwc/0": cell(10.0),
    "W3A16g64/lwc/1": cell(90.0),
    "W3A16g64/lwc+sde+cl/0": cell(8.0, 0.9),
    "W3A16g64/awq/0": cell(7.0),
    "W3A16g64/awq+sde+cl/0": cell(6.0, 1.1),
    "W3A16g64/autoround/0": cell(5.0),
    "W3A16g64/autoround+sde+cl/0": cell(6.0),
}


def test_a_row_compares_the_same_seeds() -> None:
    row = next(line for line in summary(CELLS, "W3A16g64").splitlines() if "`lwc`" in line)
    assert row == "| `lwc` | 10.00 / 1.00 | - | - | 8.00 / 0.90 | 1 |"


def test_help_is_counted_for_hosts_that_clip_on_both_texts() -> None:
    assert helped(CELLS).startswith("Of 2 runs ") and ", 1 end with both perplexities lower " in helped(CELLS)
