"""Opens a model wherever it is: a Hugging Face folder, a name on the hub, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from makeweight.errors import UserError, first_line
from makeweight.models import gguf, packed
from makeweight.models.checkpoint import TEMPLATES, Checkpoint
from makeweight.models.shards import required_json
from makeweight.paths import check_finished, expanded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_HUB_COPIES = ["*/*", "consolidated*.safetensors"]
"""Other copies of the same weights: folders inside a repository, and Mistral's own layout."""


def open_checkpoint(model: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model for reading block by block.

    `model` is a folder with config.json and safetensors, a hub name, or a .gguf file. Code that comes with a model
    runs only with `trust_remote_code`. Raises `UserError` for everything that cannot be read.
    """
    path, name = locate(model, code=trust_remote_code)
    if path.is_file():
        path = gguf.to_folder(path)
    if not (path / "config.json").is_file():
        check_finished(path)
        raise UserError(f"{path} has no config.json: give a Hugging Face model folder, a hub name or a .gguf file.")
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter beside its model: merge it first, or move adapter_config.json away.")
    raw = required_json(path / "config.json")
    quantization = raw.get("quantization_config") or {}
    try:
        bits = packed.declared_bits(quantization, str(path)) if quantization else ()
        activations = packed.declared_activations(quantization, str(path))
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}/config.json has a quantization_config that cannot be read: fetch it again.") from error
    return Checkpoint(
        path,
        _config(path, trust_remote_code, own_code="auto_map" in raw),
        name=name,
        bits=bits,
        activations=activations,
        trust_remote_code=trust_remote_code,
    )


def locate(model: str | Path, *, code: bool = False) -> tuple[Path, str]:
    """Return where a model lies on this disk, fetching it from the hub if need be, and its short name."""
    path = expanded(model)
    if path.is_dir():
        return path, path.resolve().name
    if path.is_file():
        return path, path.stem
    text = str(model)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix == ".gguf":
        raise UserError(f"{text} does not exist: give a model folder, a hub name or a .gguf file.")
    return _from_hub(text, code), text


def _from_hub(name: str, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    files = [*_HUB_FILES, "*.py"] if code else _HUB_FILES
    try:
        snapshot_download(name, allow_patterns=files, ignore_patterns=_HUB_COPIES)
        return Path(snapshot_download(name, allow_patterns=TEMPLATES))
    # The hub's own errors and those of whatever network library it uses share no base class.
    except Exception as error:
        raise UserError(
            f"{name} is neither a folder here nor a model that the hub gives ({first_line(error)}): "
            "check the name and the network, or give a local folder."
        ) from error


def _config(path: Path, trust_remote_code: bool, *, own_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    # A configuration is checked by code of its own: what that raises has no common class.
    except Exception as error:
        advice = "trust its own code with trust_remote_code" if own_code else "use the one of a supported model"
        raise UserError(
            f"{path}/config.json names no model that transformers can build ({first_line(error)}): {advice}."
        ) from error
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # the weights are decoded as they are read
    return config
