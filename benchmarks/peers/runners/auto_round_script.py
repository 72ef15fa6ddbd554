"""Runs where auto-round is installed: its tuning as its users call it, saved as dequantized weights.

    python auto_round_script.py JOB.json

Its format "fake" is a Hugging Face folder that holds the quantized values as ordinary weights. The options are
arguments of `AutoRound`, so those of its algorithm too. Samples are handed over under a name, as its own data sets are:
with a list of tensors it masks the last token of each, and every attention of its is then one with a mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import handover
from auto_round import AutoRound
from auto_round.calib_dataset import register_dataset
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "given-tokens"


def quantize(job: dict[str, Any]) -> None:
    """Write the folder OUT/dense."""
    tokens_NT = load_file(job["tokens"])["tokens"]
    columns = {"input_ids": tokens_NT.tolist(), "attention_mask": tokens_NT.new_ones(tokens_NT.shape).tolist()}
    register_dataset(NAME)(lambda **_: Dataset.from_dict(columns))
    engine = AutoRound(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto"),
        AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=job["group_size"],
        dataset=NAME,
        nsamples=tokens_NT.shape[0],
        seqlen=tokens_NT.shape[1],
        device_map="cpu",
        seed=job["seed"],
        **{"sym": False, **job["options"]},
    )
    saved = engine.quantize_and_save(str(Path(job["out"]) / "saved"), format="fake")[1]
    Path(saved[0] if isinstance(saved, list) else saved).rename(Path(job["out"]) / "dense")


def main() -> None:
    """Quantize, and say with what."""
    job = handover.read_job()
    quantize(job)
    handover.answer(job, "auto-round")


if __name__ == "__main__":
    main()
