"""The programs in the race: which version of each, how its environment is built, and which script runs it.

Environments lie in $MAKEWEIGHT_PEERS (default ~/.cache/makeweight/peers) and are built once. A new version is a new
environment; results that were made with another stay as they are, under the version that they name.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import CONSTRAINTS, python_with

RUNNERS = Path(__file__).parent / "runners"
TORCH = ("torch==2.13.0",)
PINNED = ("-c", str(CONSTRAINTS))


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program: the package that gives its version, its script, and what pip installs; nothing for our own."""

    package: str
    script: str
    steps: tuple[tuple[str, ...], ...] = ()

    def python(self) -> Path:
        """Return the interpreter that runs the script, after building its environment where there is none."""
        if not self.steps:
            return Path(sys.executable)
        root = Path(os.environ.get("MAKEWEIGHT_PEERS") or "~/.cache/makeweight/peers").expanduser()
        return python_with(root, self.package, *self.steps)


PROGRAMS: dict[str, Program] = {
    "makeweight": Program(package="makeweight", script="makeweight_script.py"),
    "auto-round": Program(
        package="auto-round",
        script="auto_round_script.py",
        steps=(TORCH, (*PINNED, "transformers", "accelerate", "auto-round==0.16.1")),
    ),
    "llm-compressor": Program(
        package="llmcompressor",
        script="llm_compressor_script.py",
        # It asks for an older transformers than constraints.txt has.
        steps=(TORCH, ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0")),
    ),
    "hqq": Program(
        package="hqq",
        script="hqq_script.py",
        steps=(TORCH, (*PINNED, "transformers", "accelerate", "hqq==0.2.8.post1")),
    ),
    "gptqmodel": Program(
        package="gptqmodel",
        script="gptqmodel_script.py",
        # Its next release asks for a newer torch than all others run on, and each for an older numpy than we have.
        steps=(TORCH, ("gptqmodel==7.6.0", "transformers==5.23.0")),
    ),
}
