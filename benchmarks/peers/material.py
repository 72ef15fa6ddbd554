"""What every run is handed: the model as a Hugging Face folder, and the calibration's token ids in one file.

    python -m benchmarks.peers.material REQUEST.json ANSWER.json

A process of its own, so that the one that starts and measures the others stays small.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from makeweight.calib.data import calibration_tokens
from makeweight.export.folder import copy_files
from makeweight.models.gguf import demo_model, to_folder
from makeweight.models.load import open_checkpoint
from makeweight.numerics.precision import fast_dtype, name_of


def prepare(request: dict[str, Any]) -> dict[str, str]:
    """Write the token ids, int64 [N, T] under "tokens", drawn as `quantize` draws them from the same text.

    Returns the model's folder, of its first "blocks" where so many are asked for, a digest of the ids, and the dtype
    for programs that leave it to their users: "auto", the model's own, where this processor has units for it.
    """
    folder = to_folder(demo_model())
    if (blocks := request.get("blocks")) is not None:
        folder = first_blocks(folder, blocks, Path(request["tokens"]).parent / f"first-{blocks}")
    ckpt = open_checkpoint(folder)
    tokens_NT = calibration_tokens(
        ckpt.tokenizer(),
        request["text"],
        nsamples=request["nsamples"],
        seqlen=request["seqlen"],
        seed=request["seed"],
    )
    save_file({"tokens": tokens_NT}, request["tokens"])
    computed = fast_dtype(ckpt.dtype, "cpu")
    return {
        "model": str(folder),
        "digest": hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest()[:16],
        "dtype": "auto" if computed == ckpt.dtype else name_of(computed),
    }


def first_blocks(folder: Path, count: int, out: Path) -> Path:
    """Write a model that has the first `count` blocks of another and all that is outside of them; return `out`."""
    ckpt = open_checkpoint(folder)
    out.mkdir(parents=True, exist_ok=True)
    tensors = dict(ckpt.rest())
    for index in range(count):
        names, state = ckpt.block_names(index), ckpt.block_state(index, ckpt.dtype)
        tensors |= {names[name]: tensor for name, tensor in state.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((ckpt.path / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}), encoding="utf-8")
    copy_files(ckpt.side_files(), ckpt.path, out)
    return out


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(prepare(json.loads(Path(sys.argv[1]).read_text()))))
