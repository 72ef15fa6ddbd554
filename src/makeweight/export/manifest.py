"""manifest.json: the size and sha256 of every file of a folder and of every tensor in it, and of itself.

A flipped bit anywhere in what was written is found by `check`, and named.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from makeweight.errors import UserError
from makeweight.paths import check_finished

NAME = "manifest.json"
REWRITTEN = ("recipe.json", "record.json")
"""What a repeated run writes again where it is lost."""


def tensor_hash(tensor: Tensor) -> str:
    """Return a sha256 over a tensor's dtype, shape and bytes."""
    import torch

    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def build(folder: Path) -> str:
    """Return the text of a folder's manifest, made from the files as they lie on the disk."""
    return _text({"files": {name: _entry(folder / name) for name in _files(folder)}, "tensors": _tensors(folder)})


def renew(folder: Path, old: Path) -> str:
    """Return an old manifest's text with what is `REWRITTEN` as it lies on the disk now; the rest is as it was written.

    A file that was damaged since stays one that `check` names.
    """
    found = json.loads(old.read_bytes())
    files = found["files"] | {name: _entry(folder / name) for name in REWRITTEN if (folder / name).is_file()}
    return _text({"files": files, "tensors": found["tensors"]})


def check(folder: Path, *, kinds: tuple[str, ...] = ("",), strangers: bool = True) -> list[str]:
    """Return one sentence for everything in which a folder differs from its manifest; empty where nothing does.

    kinds: the ends of the names that are looked into; of others only absence counts, but for what is `REWRITTEN`.
    strangers: whether a file that was not written counts. Raises UserError where there is no folder or no manifest.
    """
    if not (folder / NAME).is_file():
        check_finished(folder)
        raise UserError(f"{folder} has no {NAME}: give a folder that makeweight wrote, with all of its files.")
    text = (folder / NAME).read_bytes()
    try:
        found: dict[str, Any] = json.loads(text)
        sound = _text({"files": found["files"], "tensors": found["tensors"]}).encode() == text
    except (ValueError, KeyError, TypeError):
        sound = False
        found = {}
    if not sound:
        return [f"{NAME} itself is damaged."]
    problems = []
    files, present = found["files"], set(_files(folder))
    for name, entry in files.items():
        looked_into = name.endswith(kinds)
        if name not in present:
            problems += [f"{name} is missing."] if looked_into or name not in REWRITTEN else []
        elif not looked_into:
            continue
        elif (size := (folder / name).stat().st_size) != entry["bytes"]:
            problems.append(f"{name} has {size} bytes instead of {entry['bytes']}.")
        elif _file_hash(folder / name) != entry["sha256"]:
            problems += _damaged(folder, name, found["tensors"])
    others = sorted(present - files.keys()) if strangers else []
    return problems + [f"{name} is not part of what was written." for name in others if name.endswith(kinds)]


def strangers(folder: Path) -> list[str]:
    """Return the files of a folder that its manifest does not name, hidden ones too; none where there is no folder.

    Raises UserError where the manifest cannot tell.
    """
    if not folder.exists():
        return []
    try:
        known = {NAME, *json.loads((folder / NAME).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged, its {NAME} as well: delete it, or give another --out.") from error
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(set(found) - known)


def _damaged(folder: Path, name: str, tensors: dict[str, Any]) -> list[str]:
    """Name the tensors of a damaged file that differ, where the file can still be read."""
    known = {key: entry for key, entry in tensors.items() if entry["file"] == name}
    try:
        now = _tensors_of(folder / name) if known else {}
    # Whatever a damaged header leads its reader into.
    except Exception:
        now = {}
    changed = [key for key, entry in known.items() if now.get(key) not in (None, entry["sha256"])]
    where = f" in {', '.join(changed)}" if changed else ""
    return [f"{name} is damaged{where}."]


def _text(content: dict[str, Any]) -> str:
    """Write a manifest, its own hash included, in the one way that counts as undamaged."""
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1, sort_keys=True) + "\n"


def _files(folder: Path) -> list[str]:
    """Return every file but the manifest, whole or begun, and hidden ones, which hubs and file managers add."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = (path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in names if name not in (NAME, f"{NAME}.part"))


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _file_hash(file)}


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensors(folder: Path) -> dict[str, Any]:
    return {
        tensor: {"file": file.name, "sha256": digest}
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
        for tensor, digest in _tensors_of(file).items()
    }


def _tensors_of(file: Path) -> dict[str, str]:
    if file.suffix == ".gguf":
        from makeweight.export.gguf_file import stored_tensors

        return {name: hashlib.sha256(stored.data.data).hexdigest() for name, stored in stored_tensors(file).items()}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return {name: tensor_hash(handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118
