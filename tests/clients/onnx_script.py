"""Runs where onnxruntime, onnxruntime-genai and numpy are installed: logits and greedy texts of an exported folder.

    python onnx_script.py FOLDER TOKENS.json LOGITS.npy PROMPT COUNT

Writes the logits (T, V) of a text, and prints what follows its first PROMPT tokens: COUNT tokens chosen greedily
with ONNX Runtime alone and with onnxruntime-genai. T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def session(folder: Path) -> Any:
    """Open the model on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(run: Any, tokens: list[int], past: dict[str, np.ndarray] | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the logits (T, V) of new tokens, and the keys and values to give with the next ones."""
    states = [item for item in run.get_inputs() if item.name.startswith("past_key_values")]
    held = past or {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in states}
    total = next(iter(held.values())).shape[2] + len(tokens)
    ids, mask = np.array([tokens], np.int64), np.ones((1, total), np.int64)
    logits, *new = run.run(None, {"input_ids": ids, "attention_mask": mask, **held})
    names = [item.name.replace("present", "past_key_values") for item in run.get_outputs()[1:]]
    return logits[0], dict(zip(names, new, strict=True))


def greedy(run: Any, prompt: list[int], count: int) -> list[int]:
    """Choose the most likely token `count` times."""
    found: list[int] = []
    logits, past = step(run, prompt, None)
    while len(found) < count:
        found.append(int(logits[-1].argmax()))
        logits, past = step(run, found[-1:], past)
    return found


def greedy_genai(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Do the same with onnxruntime-genai, which keeps keys and values in one buffer."""
    import onnxruntime_genai as genai  # pyright: ignore[reportMissingImports] # only in the client's environment

    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + count, min_length=len(prompt) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def main() -> None:
    """Run and print."""
    folder, tokens = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    cut, count = int(sys.argv[4]), int(sys.argv[5])
    run = session(folder)
    logits, _ = step(run, tokens, None)
    np.save(sys.argv[3], logits)
    prompt = tokens[:cut]
    print(json.dumps({"greedy": greedy(run, prompt, count), "genai": greedy_genai(folder, prompt, count)}))


if __name__ == "__main__":
    main()
