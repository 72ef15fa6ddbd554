"""Uploads a written folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from makeweight.errors import UserError, first_line

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Of these a repository holds one model's; GGUF files of several models may lie side by side."""


def push(folder: Path, repository: str) -> str:
    """Upload a folder to `repository` (user/name), made if need be, and return its address.

    Weights of an earlier upload that have no place in this one are deleted, or readers would find both. Raises
    UserError where the hub refuses.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = str(hub.create_repo(repository, exist_ok=True))
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Add the quantized model",
            delete_patterns=list(WEIGHTS) if any(folder.glob(WEIGHTS[0])) else None,
        )
    # The hub's own errors and those of whatever network library it uses share no base class.
    except Exception as error:
        raise UserError(
            f"{repository} did not take {folder} ({first_line(error)}): log in with `hf auth login`, or check the name."
        ) from error
    return address
