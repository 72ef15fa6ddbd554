"""Environments of real clients: made by the tests themselves, once, outside the repository.

Each lives in $MAKEWEIGHT_CLIENTS (default ~/.cache/makeweight/clients) under a name made from what is installed in
it, and is whole if it exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def home() -> Path:
    """Return the folder that holds all environments."""
    return Path(os.environ.get("MAKEWEIGHT_CLIENTS") or "~/.cache/makeweight/clients").expanduser()


def python_with(name: str, *steps: Sequence[str], remove: Sequence[str] = ()) -> Path:
    """Return the interpreter of a virtual environment in which `pip install` ran with each of `steps`, in order.

    `remove` names packages to uninstall again at the end.
    """
    text = json.dumps([sys.version_info[:2], steps, remove])
    folder = home() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
        for step in steps:
            subprocess.run([*pip, "install", *step], check=True)
        if remove:
            subprocess.run([*pip, "uninstall", "-y", *remove], check=True)
        (folder / "ready").touch()
    return folder / "bin" / "python"


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
