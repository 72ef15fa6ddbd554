"""Other quantizers and ours side by side on a processor, each at its own options, on one calibration.

    python -m benchmarks.peers [--settings W4A16,W3A16g64] [--runs NAME,...] [--threads N] [--retry]
    python -m benchmarks.peers --smoke
    python -m benchmarks.peers --speed ROUNDS [--blocks 4] [--pair best]
    python -m benchmarks.peers --table

Every run is a process of its own, one at a time, ours and theirs in turn. Results go to benchmarks/results/peers.json
cell by cell, and a cell that is there is not run again; a run of ours that was stopped goes on. --smoke proves in
minutes that every program runs here: one setting, few samples, two steps, results thrown away. --speed compares time
and memory with auto-round's on the first blocks of the model, at equal steps and tokens or those of an effort of ours
and its recipe. --table prints what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import RESULTS, WORK, Cells
from benchmarks.peers.child import BrokenRunError
from benchmarks.peers.race import Terms, Track, race
from benchmarks.peers.runs import SETTINGS, SMOKE_SETTINGS, entries
from benchmarks.peers.speed import PAIRS, speed, summary
from benchmarks.peers.table import markdown
from makeweight.errors import UserError

FILE = RESULTS / "peers.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 2 is the exit code of a request that cannot work, 1 of a smoke run that failed."""
    args = parse(argv)
    try:
        if args.table:
            print(markdown(Cells(FILE).cells))
            return 0
        if args.speed is not None:
            track = Track(replace(Terms.full(args.threads), blocks=args.blocks), WORK / "speed")
            results = Cells(RESULTS / "speed.json")
            speed(results, track, args.speed, PAIRS[args.pair])
            print(summary(results.cells, track, PAIRS[args.pair]))
            return 0
        settings = split(args.settings) or (SMOKE_SETTINGS if args.smoke else SETTINGS)
        chosen = entries(settings, split(args.runs))
        if args.smoke:
            with tempfile.TemporaryDirectory(prefix="makeweight-peers-") as folder:
                results = Cells(Path(folder) / "peers.json")
                race(results, chosen, Track(Terms.smoke(args.threads), Path(folder)).cell)
                print(markdown(results.cells))
                return int(any("error" in cell for cell in results.cells.values()))
        results = Cells(FILE)
        track = Track(Terms.full(args.threads), WORK / "peers")
        race(results, chosen, track.cell, clear=track.clear, retry=args.retry)
        print(markdown(results.cells))
    except (UserError, BrokenRunError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings", default="", help=f"schemes, with commas between them; default {','.join(SETTINGS)}"
    )
    parser.add_argument("--runs", default="", help="names of runs, with commas between them; all where none is given")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every run and of the evaluation")
    parser.add_argument("--retry", action="store_true", help="run again what failed or had other options")
    parser.add_argument("--smoke", action="store_true", help="only prove that every program runs")
    parser.add_argument("--speed", type=int, metavar="ROUNDS", help="ours and auto-round, so many times in turn")
    parser.add_argument("--pair", choices=PAIRS, default="equal", help="of --speed: equal steps, or efforts")
    parser.add_argument("--blocks", type=int, default=4, help="of the model of --speed, of its 30")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and run nothing")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("give at least one thread")
    if args.speed is not None and (args.speed < 1 or args.settings or args.runs or args.retry or args.smoke):
        parser.error("--speed takes a number of rounds, and of the other options --pair, --blocks and --threads alone")
    if args.speed is None and args.pair != "equal":
        parser.error("--pair is of --speed: give that, too")
    if not 1 <= args.blocks <= 30:
        parser.error("give --blocks a number from 1 to 30")
    return args


def split(text: str) -> list[str]:
    """Read a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
