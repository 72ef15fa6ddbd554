"""Runs where transformers is installed: how much more likely the most likely token was than one that was chosen.

    python gaps_script.py FOLDER TEXTS

TEXTS is a JSON file: a list of {"prompt": [ids], "chosen": [ids]}. Prints a list with, for each text, what each chosen
token lacks in log-probability (float32) against the most likely one; a greedy text has zeros only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def gaps(model: Any, prompt: list[int], chosen: list[int]) -> list[float]:
    """Return one gap in nats for each chosen token, all of them read in one pass."""
    tokens = torch.tensor([prompt + chosen])
    logits_CV = model(tokens).logits[0, len(prompt) - 1 : -1].float()
    own_C = logits_CV.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    return (logits_CV.amax(-1) - own_C).tolist()


def main() -> None:
    """Judge and print."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    texts = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps([gaps(model, text["prompt"], text["chosen"]) for text in texts]))


if __name__ == "__main__":
    main()
