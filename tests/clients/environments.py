"""Environments of real clients: made by the tests themselves, once, outside the repository.

Each lives in $MAKEWEIGHT_CLIENTS (default ~/.cache/makeweight/clients) under a name made from what is installed in
it, and is whole if it exists.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environments

CONSTRAINTS = environments.CONSTRAINTS


def home() -> Path:
    """Return the folder that holds all environments."""
    return Path(os.environ.get("MAKEWEIGHT_CLIENTS") or "~/.cache/makeweight/clients").expanduser()


def python_with(name: str, *steps: Sequence[str], remove: Sequence[str] = ()) -> Path:
    """Return the interpreter of a client's virtual environment; see `benchmarks.environments`."""
    return environments.python_with(home(), name, *steps, remove=remove)


def ask(python: Path, script: Path, *arguments: str, timeout: int = 900, **environment: str) -> Any:
    """Run a script in another environment and return the JSON in the last line that it prints."""
    done = subprocess.run(
        [str(python), str(script), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
