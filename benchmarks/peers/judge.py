"""The one evaluator: is a dense folder on the grid that was asked for, and what perplexity does it have?

On the windows of all tables and, under "later", on as many from the second half of each text, which no choice of ours
looked at.

    python -m benchmarks.peers.judge REQUEST.json ANSWER.json

A process of its own, so that the one that starts and measures the runs stays small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import divergences, perplexities
from benchmarks.peers.runs import note_on
from makeweight.evals.perplexity import Perplexity, Texts, compare
from makeweight.export.folder import copy_files
from makeweight.models.checkpoint import Checkpoint
from makeweight.models.load import open_checkpoint
from makeweight.numerics.flops import matmul_rate
from makeweight.numerics.precision import named_dtype


def most_values(weight_OI: Tensor, group_size: int) -> int:
    """Return how many different values the richest group of a matrix has; -1 makes a group of every row."""
    rows, width = weight_OI.shape
    sorted_OGS = weight_OI.float().reshape(rows, -1, width if group_size == -1 else group_size).sort(-1).values
    return int((sorted_OGS.diff(dim=-1) != 0).sum(-1).max()) + 1


def check_grid(ours: Checkpoint, original: Checkpoint, *, bits: int, group_size: int) -> dict[str, Any]:
    """Count the values in every group of the blocks' linears, and name what else was changed in the blocks.

    Weights that were rounded to the model's dtype keep their number of values or lose some; what is outside the blocks
    must be unchanged. Raises ValueError for a folder that is not what was asked for.
    """
    before, after = dict(original.rest()), dict(ours.rest())
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            raise ValueError(f"{name} is not quantized here and was changed.")
    found, others, rounded = 0, set[str](), {f"{name}.weight" for name in original.linears()}
    for block in range(original.n_blocks):
        weights, expected = ours.block_state(block), original.block_state(block)
        for name in expected:
            if weights[name].dtype != expected[name].dtype:
                raise ValueError(f"{name} of block {block} is {weights[name].dtype}, not in the model's dtype.")
            if name in rounded:
                found = max(found, most_values(weights[name], group_size))
            elif not torch.equal(weights[name], expected[name]):
                others.add(name)
    if found > 2**bits:
        raise ValueError(f"a group holds {found} different values, and {bits} bits allow {2**bits}.")
    return {"most_values": found, "allowed": 2**bits, "also_changed": sorted(others)}


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Check and measure a folder; it gets the original's config and tokenizer first, so that only weights differ."""
    folder, answer = Path(request["folder"]), {}
    datasets, windows = [*request["texts"], *request["later"]], 2 * list(request["windows"])
    texts = Texts(datasets=datasets, seqlen=request["eval_seqlen"], windows=windows, device="cpu")
    if "original" in request:
        original = open_checkpoint(request["original"])
        copy_files([*original.side_files(), original.path / "config.json"], original.path, folder)
        ours = open_checkpoint(folder)
        answer["note"] = note_on(request["run"])
        answer["grid"] = check_grid(ours, original, bits=request["bits"], group_size=request["group_size"])
        found = compare(str(folder), request["original"], texts)[0]
    else:
        found = texts.results(*texts.read(texts.open(str(folder))))
    count = len(request["texts"])
    # Of the machine, as in benchmarks/step.py.
    rate = matmul_rate(rows=4096, size=576, dtype=named_dtype("auto", "cpu"))
    return {**answer, **_scores(found[:count]), "later": _scores(found[count:]), "rate_gflops": round(rate / 1e9)}


def _scores(found: list[Perplexity]) -> dict[str, dict[str, float]]:
    return {"perplexities": perplexities(found), "divergence": divergences(found)}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(judge(json.loads(Path(sys.argv[1]).read_text()))))
