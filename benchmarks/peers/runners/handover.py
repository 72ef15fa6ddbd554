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


def dtype(job: dict[str, Any]) -> torch.dtype | str:
    """Return the dtype in which to load the model: its own, or float32 where the processor has no units for that."""
    return "auto" if job["dtype"] == "auto" else getattr(torch, job["dtype"])


def save(model: nn.Module, job: dict[str, Any]) -> None:
    """Write OUT/dense with the tensors that the original has, in its dtypes; who asked adds config and tokenizer."""
    state, folder = model.state_dict(), Path(job["out"]) / "dense"
    tensors = {}
    for file in Path(job["model"]).glob("*.safetensors"):
        with safe_open(file, "pt") as original:
            for name in original.keys():  # noqa: SIM118 - it is no mapping
                tensors[name] = state[name].to(original.get_tensor(name).dtype).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def answer(job: dict[str, Any], *packages: str, **more: Any) -> None:
    """Write OUT/answer.json: versions, the number of threads, and whatever else is worth keeping."""
    versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    told = {"versions": versions, "threads": torch.get_num_threads(), **more}
    Path(job["out"], "answer.json").write_text(json.dumps(told))
