"""A record says what was asked, what it gave and what it cost, in JSON and in plain words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from makeweight.evals.perplexity import Perplexity
from makeweight.recipe import Calib, Recipe
from makeweight.report.record import FILE, Cost, Record, recipe_data

RECIPE = Recipe(model="org/Tiny", out="out", method="lwc+sde", blocks=(0, 2), calib=Calib(dataset="słowa.txt"))


def measured(**perplexities: float) -> tuple[Perplexity, ...]:
    return tuple(
        Perplexity(name, value, math.log(value), windows=3, tokens=192, seqlen=64, seconds=0.1 + 0.2)
        for name, value in perplexities.items()
    )


def a_record(**changes: Any) -> Record:
    record = Record(
        recipe=recipe_data(RECIPE),
        path="/somewhere/out",
        digest="ab" * 32,
        bits_per_weight=3.296875,
        file_bytes=123_456_789,
        source_bytes=987_654_321,
        perplexities=measured(wiki=12.5, code=8.25),
        baselines=measured(wiki=12.0, code=8.0),
        blocks=({"block": 0, "digest": {"q": "00"}, "bits": {"q": [3.25, 64]}, "error_after": 1 / 3}, {"block": 1}),
        cost=Cost(solve_seconds=1 / 7, evaluate_seconds=2.5, peak_memory_bytes=2**31, peak_gpu_bytes=5),
        machine={"device": "cpu: some", "threads": "2"},
    )
    return replace(record, **changes)


@pytest.mark.parametrize(
    "record",
    [a_record(), a_record(baselines=(), machine={}, blocks=()), a_record(perplexities=measured(wiki=math.inf))],
    ids=["full", "bare", "broken"],
)
def test_json_both_ways(record: Record, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(record.to_json(), encoding="utf-8")
    again = Record.load(tmp_path)
    assert again == record
    assert again.to_json() == record.to_json()
    assert isinstance(again.perplexities, tuple) and isinstance(again.perplexities[0], Perplexity)
    assert Recipe.from_json(json.dumps(again.recipe)) == RECIPE
    assert again.method == "lwc+sde"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (10.0, 9.0, "stays close to the original: perplexity on wiki went from 10.00 to 9.00."),
        (10.0, 10.0, "stays close"),
        (10.0, 10.5, "stays close"),
        (10.0, 10.51, "is somewhat worse than the original: perplexity on wiki went from 10.00 to 10.51."),
        (10.0, 12.0, "is somewhat worse"),
        (10.0, 12.01, "is noticeably worse than the original: perplexity on wiki went from 10.00 to 12.01."),
        (10.0, 19.99, "is noticeably worse"),
        (10.0, 20.0, "is broken: perplexity on wiki went from 10.00 to 20.00. Use more bits"),
        (10.0, 1e9, "is broken"),
        (10.0, math.inf, "is broken: perplexity on wiki went from 10.00 to inf."),
    ],
)
def test_verdicts(before: float, after: float, says: str) -> None:
    verdict = a_record(perplexities=measured(wiki=after), baselines=measured(wiki=before)).verdict()
    assert verdict.startswith("This model ") and says in verdict
    assert [word in verdict for word in ("close", "worse", "broken")].count(True) == 1


def test_the_worst_text_rules() -> None:
    kept, lost = a_record(perplexities=measured(wiki=10, code=30, docs=11)), measured(docs=10.0, wiki=9.0, code=10.0)
    assert "broken: perplexity on code went from 10.00 to 30.00" in replace(kept, baselines=lost).verdict()
    assert "on wiki" in replace(kept, baselines=measured(docs=10.0, wiki=9.0)).verdict()


def test_nothing_to_compare_with_gives_no_verdict() -> None:
    assert a_record(baselines=()).verdict() == ""
    assert a_record(perplexities=()).verdict() == ""
    assert a_record(baselines=measured(docs=3.0)).verdict() == ""


@pytest.mark.parametrize("names", [("wiki", "code"), ("code", "wiki")])
def test_an_original_that_is_broken_itself_stays_close_to_nothing(names: tuple[str, str]) -> None:
    after, before = {"wiki": 10.0, "code": math.inf}, {"wiki": 10.0, "code": math.inf}
    record = a_record(
        perplexities=measured(**{name: after[name] for name in names}),
        baselines=measured(**{name: before[name] for name in names}),
    )
    says = "Nothing can be said of this model: the original itself has no finite perplexity on code."
    assert record.verdict() == says


@pytest.mark.parametrize(
    ("same", "says"), [(0.91, "close"), (0.89, "somewhat"), (0.69, "noticeably"), (0.39, "broken")]
)
def test_perplexity_that_fell_by_luck_is_no_proof(same: float, says: str) -> None:
    after = tuple(replace(result, divergence=1.0, same_top=same) for result in measured(wiki=9.0))
    assert says in a_record(perplexities=after, baselines=measured(wiki=10.0)).verdict()


def test_json_has_no_word_for_infinity(tmp_path: Path) -> None:
    record = a_record(perplexities=measured(wiki=math.inf), baselines=measured(wiki=10.0))
    (tmp_path / FILE).write_text(record.to_json())
    assert "Infinity" not in record.to_json() and "NaN" not in record.to_json()
    assert Record.load(tmp_path).verdict() == record.verdict()
