"""Small runs end to end: one text, one recipe, ways to end them in between, and to look at the folders they write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Calib, Eval, Recipe, Tune

LINES = "Sphinx of black quartz, judge my vow; {0} wizards jump {1} times over the lazy dog.\n"


def a_text(path: Path, lines: int = 40) -> Path:
    """Write a text of about 80 bytes a line; the tiny tokenizer makes a token of each byte."""
    path.write_text("".join(LINES.format(i * i % 97, i) for i in range(lines)), encoding="utf-8")
    return path


def small(model: Path, out: Path, text: Path, **changes: Any) -> Recipe:
    """Return a recipe that runs in a second; `changes` replaces fields."""
    recipe = Recipe(
        model=str(model),
        out=str(out),
        method="lwc+sde+cl",
        scheme=Scheme.parse("W3A16g32"),
        calib=Calib(dataset=str(text), nsamples=8, seqlen=32),
        tune=Tune(steps=4, device="cpu"),
        eval=Eval(datasets=(str(text),), seqlen=64, windows=2, baseline=False),
    )
    return replace(recipe, **changes)


def tensors(folder: str | Path) -> dict[str, Tensor]:
    """Return every tensor of a folder's shards, and check that no name is stored twice."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        held = load_file(file)
        assert not held.keys() & found.keys()
        found |= held
    return found


def same_bits(ours: Tensor, other: Tensor) -> bool:
    """Say whether two tensors agree in dtype, shape and every bit."""
    alike = ours.dtype == other.dtype and ours.shape == other.shape
    return alike and torch.equal(ours.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def files(folder: str | Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, at any depth."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def weights_of(folder: str | Path) -> dict[str, Tensor]:
    """Return the weights that a folder's quantized linears stand for, by full name, as our own reader sees them."""
    ckpt = open_checkpoint(folder)
    return {
        f"{ckpt.block_module_path(i)}.{name}.weight": state[f"{name}.weight"]
        for i in range(ckpt.n_blocks)
        for state in [ckpt.block_state(i)]
        for name in ckpt.linears()
    }


@torch.no_grad()
def our_logits(folder: str | Path, tokens_NT: Tensor) -> Tensor:
    """Return the logits of a folder, put together block by block by our own reader."""
    ckpt = open_checkpoint(folder)
    model = ckpt.skeleton()
    for i in range(ckpt.n_blocks):
        ckpt.load_block(model, i)
    return model(input_ids=tokens_NT, use_cache=False).logits


class Killed(BaseException):
    """What no handler of the program catches."""


def kill(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """End the program where a method is called with arguments that `when` accepts."""
    original = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)


def interrupted(recipe: Recipe, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Run a recipe that ends so."""
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, owner, name, when)
        with pytest.raises(Killed):
            quantize(recipe)
