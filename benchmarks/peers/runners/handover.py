"""What the scripts beside this share: reading the job, writing the dense folder, and saying with what it was made."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def read_job() -> dict[str, Any]:
    """Read the JSON file that the command line names."""
    return json.loads(Path(sys.argv[1]).read_text())


def save(model: nn.Module, job: dict[str, Any]) -> None:
    """Write OUT/dense with the tensors that the original has; config and tokenizer are added by who asked."""
    state, folder = model.state_dict(), Path(job["out"]) / "dense"
    files = Path(job["model"]).glob("*.safetensors")
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118 - it is no mapping
    folder.mkdir(parents=True)
    save_file({name: state[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"})


def answer(job: dict[str, Any], *packages: str, **more: Any) -> None:
    """Write OUT/answer.json: versions, the number of threads, and whatever else is worth keeping."""
    versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    told = {"versions": versions, "threads": torch.get_num_threads(), **more}
    Path(job["out"], "answer.json").write_text(json.dumps(told))
