"""Virtual environments for other programs: made once, outside the repository, by benchmarks and by tests.

Each lies in a folder named after what is installed in it, and is whole if it is marked as ready.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def python_with(root: Path, name: str, *steps: Sequence[str], remove: Sequence[str] = ()) -> Path:
    """Return the interpreter of a virtual environment in which `pip install` ran with each of `steps`, in order.

    It lies below `root`; `remove` names packages to uninstall again at the end. Raises CalledProcessError where pip
    fails.
    """
    text = json.dumps([sys.version_info[:2], steps, remove])
    folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
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
