"""Tables show every run beside the original, and say in a sentence what was lost."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

from rich.console import Console

from makeweight.evals.perplexity import Perplexity
from makeweight.report.record import Cost, Record
from makeweight.report.tables import compare, show


def measured(**perplexities: float) -> tuple[Perplexity, ...]:
    return named(perplexities)


def named(perplexities: dict[str, float]) -> tuple[Perplexity, ...]:
    return tuple(Perplexity(name, value, 1.0, 3, 192, 64, 0.5) for name, value in perplexities.items())


def a_record(method: str = "lwc+sde+cl", **changes: Any) -> Record:
    record = Record(
        recipe={"method": method},
        path="/somewhere/out",
        digest="ab",
        bits_per_weight=3.296875,
        file_bytes=123_456_789,
        source_bytes=987_654_321,
        perplexities=measured(wiki=12.504, code=8.25),
        baselines=measured(wiki=11.996, code=8.0),
        blocks=(),
        cost=Cost(solve_seconds=61.4, evaluate_seconds=2.5, peak_memory_bytes=2_345_000_000),
    )
    return replace(record, **changes)


def printed(*records: Record, one: bool = False, width: int = 160) -> list[list[str]]:
    """Return the words of every line that has some."""
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    show(records[0], console) if one else compare(records, console)
    return [line.split() for line in stream.getvalue().splitlines() if line.strip(" ─")]


def test_one_run_beside_the_original() -> None:
    head, original, row, verdict, written = printed(a_record(), one=True)
    assert " ".join(head) == "perplexity wiki code bits/weight file MB seconds peak MB"
    assert original == ["original", "12.00", "8.00", "16", "987.7"]
    assert row == ["lwc+sde+cl", "12.50", "8.25", "3.30", "123.5", "61", "2345"]
    assert " ".join(verdict).startswith("This model stays close to the original: perplexity on wiki")
    assert written == ["Written", "to", "/somewhere/out"]


def test_divergences_have_columns_where_they_were_measured() -> None:
    apart = [replace(result, divergence=0.0456, same_top=0.912) for result in measured(wiki=12.504, code=8.25)]
    head, original, row, plain, verdict = printed(a_record(perplexities=tuple(apart)), a_record("rtn"))
    assert " ".join(head) == "perplexity wiki code KL wiki KL code bits/weight file MB seconds peak MB"
    assert original == ["original", "12.00", "8.00", "0", "0", "16", "987.7"]
    assert row[:5] == ["lwc+sde+cl", "12.50", "8.25", "0.046", "0.046"] and plain[3:5] == ["-", "-"]
    assert "likeliest" not in " ".join(verdict)
    said = " ".join(printed(a_record(perplexities=tuple(apart)))[-1])
    assert "and the likeliest next token is the original's 91 % of the time." in said
    apart[1] = replace(apart[1], same_top=0.35)
    said = a_record(perplexities=tuple(apart)).verdict()
    assert "perplexity on wiki went" in said and "and on code the likeliest next token is the original's 35 %" in said


def test_several_runs_keep_their_order_and_the_last_is_judged() -> None:
    rtn = a_record("rtn", perplexities=measured(wiki=math.inf, code=1e4), baselines=())
    lines = printed(rtn, a_record("lwc", perplexities=measured(wiki=15.0, code=9.0)), a_record())
    assert [line[0] for line in lines[1:4]] == ["original", "rtn", "lwc"]
    assert lines[2][1:3] == ["inf", "10000.00"]
    assert lines[4][0] == "lwc+sde+cl" and "close" in lines[5]
    assert printed(a_record(), rtn)[1][0] == "original", "whichever run measured it"
    assert len(printed(a_record(), rtn)) == 4, "rtn is last and was not measured against the original"


def test_without_an_original() -> None:
    head, row = printed(a_record(baselines=()))
    assert " ".join(head).startswith("perplexity wiki code bits/weight")
    assert row[0] == "lwc+sde+cl"


def test_the_originals_bits_are_those_of_its_file() -> None:
    assert printed(a_record(source_bits=32))[1][3] == "32"


def test_nothing_measured() -> None:
    head, row = printed(a_record(perplexities=(), baselines=()))
    assert " ".join(head) == "bits/weight file MB seconds peak MB"
    assert row == ["lwc+sde+cl", "3.30", "123.5", "61", "2345"]


def test_a_text_that_one_run_was_not_measured_on() -> None:
    lines = printed(a_record("rtn", perplexities=measured(code=9.0)), a_record())
    assert lines[2][:3] == ["rtn", "-", "9.00"]


def test_paths_are_shortened_but_told_apart_and_brackets_are_words() -> None:
    values = named({"/data/[red]/train.txt": 10.0, "/data/b/train.txt": 11.0, "wikitext2": 12.0})
    head = " ".join(printed(a_record(perplexities=values, baselines=values))[0])
    assert "/data" not in head
    assert "perplexity [red]/train b/train wikitext2" in head


def test_the_larger_memory_is_shown() -> None:
    cost = Cost(solve_seconds=1.0, evaluate_seconds=1.0, peak_memory_bytes=10**9, peak_gpu_bytes=7 * 10**9)
    assert printed(a_record(cost=cost))[2][-1] == "7000"


def test_a_narrow_terminal_loses_no_number() -> None:
    whole = "".join(word for line in printed(a_record(), width=40) for word in line)
    assert "lwc+sde+cl" in whole or "lwc" in whole
    text = " ".join(" ".join(line) for line in printed(a_record(), width=60))
    assert all(number in text for number in ("12.50", "8.25", "3.30", "123.5", "61", "2345"))
