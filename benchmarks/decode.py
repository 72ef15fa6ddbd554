"""Decoding speed in a runtime: what was learned costs nothing there, and what fewer bits bring.

    python -m benchmarks.decode --runtime vllm --python PYTHON OURS OTHER [DENSE]

OURS and OTHER are exported folders of one scheme, such as one with learned codes and one by round-to-nearest, DENSE is
the 16-bit model; PYTHON is an interpreter in which the runtime is installed. Each model lives in a process of its own,
and the processes decode in turn, so that a busy moment hits all of them; then all are started anew. Prints tokens per
second of one sequence and the ratio to OURS, both as medians over the starts of medians over the rounds, and keeps
them as JSON. A folder and its own copy show how far equal files come out apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common import RESULTS, write_json

ROLES = ("ours", "other", "dense")
PROMPT = "The lighthouse keeper counted 17 ships before noon and"
FILE = RESULTS / "decode.json"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # where the processor can, vLLM would round the activations of 4-bit models to 8 bits
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

Decode = Callable[[int], int]
"""Goes on after the prompt for so many tokens and returns how many there were."""


def vllm(folder: str) -> tuple[Decode, str]:
    """Load a folder in vLLM, in this very process: a waiting worker of its own would not sit still."""
    module, torch = importlib.import_module("vllm"), importlib.import_module("torch")
    model = module.LLM(
        folder, enforce_eager=True, max_model_len=1024, max_num_seqs=1, distributed_executor_backend="uni"
    )

    def decode(tokens: int) -> int:
        sampling = module.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return len(model.generate([PROMPT], sampling, use_tqdm=False)[0].outputs[0].token_ids)

    return decode, f"vLLM {module.__version__}, threads: {torch.get_num_threads()}"


RUNTIMES: dict[str, Callable[[str], tuple[Decode, str]]] = {"vllm": vllm}
"""Each loads a folder, where only the runtime is installed, and says what it is."""


def work(runtime: str, folder: str, tokens: int) -> None:
    """Hold one model and answer every line of input with the tokens decoded per second."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the runtime has to say must not mix with the answers
    decode, about = RUNTIMES[runtime](folder)
    decode(tokens)
    print(about, file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        count = decode(tokens)
        print(count / (time.perf_counter() - start), file=answers, flush=True)


class Worker:
    """A process that holds one model; raises RuntimeError with its last words where it ends too early."""

    def __init__(self, python: str, runtime: str, folder: str, tokens: int) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [python, __file__, "--work", "--runtime", runtime, "--tokens", str(tokens), folder],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.about = self._answer().strip()

    def rate(self) -> float:
        """Decode once and return tokens per second."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        self.process.wait()
        self.log.seek(0)
        raise RuntimeError(f"the runtime ended:\n{self.log.read()[-4000:]}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def alternate(workers: Sequence[Worker], rounds: int) -> list[list[float]]:
    """Decode in turn and return the rates of every worker."""
    rates: dict[Worker, list[float]] = {worker: [] for worker in workers}
    for turn in range(rounds):
        for worker in workers[:: -1 if turn % 2 else 1]:  # nobody is always the one after another
            rates[worker].append(worker.rate())
    return list(rates.values())


def measure(
    folders: Sequence[str], *, python: str, runtime: str, tokens: int, rounds: int, starts: int
) -> dict[str, Any]:
    """Start all processes several times, decode in turn, and return one row per folder below what was asked."""
    found: list[list[list[float]]] = []
    about = ""
    for start in range(starts):
        # Of equal files the one loaded later was up to 6 % faster for as long as both lived: both orders count.
        with ExitStack() as stack:
            order = folders[:: -1 if start % 2 else 1]
            workers = [stack.enter_context(Worker(python, runtime, folder, tokens)) for folder in order]
            about = workers[0].about
            found.append(alternate(workers[:: -1 if start % 2 else 1], rounds))
    rows: list[dict[str, Any]] = []
    for index, (role, folder) in enumerate(zip(ROLES, folders, strict=False)):
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        medians = [statistics.median(rates[index]) for rates in found]
        ratios = [own / statistics.median(rates[0]) for own, rates in zip(medians, found, strict=True)]
        rows.append(
            {
                "role": role, "megabytes": size / 1e6, "tokens_per_second": statistics.median(medians),
                "lowest": min(medians), "highest": max(medians),
                "times_ours": statistics.median(ratios), "times_ours_each": ratios,
            }
        )  # fmt: skip
    return {"about": about, "tokens": tokens, "rounds": rounds, "starts": starts, "rows": rows}


def main() -> None:
    """Measure, print, and keep the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="OURS OTHER [DENSE]")
    parser.add_argument("--runtime", choices=RUNTIMES, default="vllm")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the runtime")
    parser.add_argument("--tokens", type=int, default=128, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each process")
    parser.add_argument("--starts", type=int, default=6, help="times that all are started, in either order; even")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.runtime, args.folders[0], args.tokens)
        return
    if not 2 <= len(args.folders) <= len(ROLES):
        parser.error("give two or three folders: OURS OTHER [DENSE]")
    found = measure(
        args.folders,
        python=args.python,
        runtime=args.runtime,
        tokens=args.tokens,
        rounds=args.rounds,
        starts=args.starts,
    )
    print(f"{found['about']}; {args.starts} starts, {args.rounds} rounds of {args.tokens} tokens each")
    print("  model    MB on disk   tokens/s   (lowest - highest)   times ours")
    for row in found["rows"]:
        span = f"({row['lowest']:.1f} - {row['highest']:.1f})"
        speed = f"{row['tokens_per_second']:>10.1f}   {span:<18}"
        print(f"  {row['role']:<8} {row['megabytes']:>10.0f} {speed} {row['times_ours']:>12.3f}")
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
    names = " ".join(Path(folder).name for folder in args.folders)
    write_json(FILE, {**kept, f"{args.runtime}: {names}": found})


if __name__ == "__main__":
    main()
