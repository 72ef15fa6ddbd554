"""Rounding of what enters linears, as a runtime does that multiplies integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from makeweight.numerics.grid import round_tokens


def round_inputs(module: nn.Module, linears: Sequence[str], bits: int) -> list[RemovableHandle]:
    """Have linears, by name, round what enters them to `bits` bits, one scale for each token; 16 bits stay as they are.

    Returns what takes the rounding off again. Gradients pass through it.
    """
    if bits >= 16:
        return []

    def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_tokens(given[0], bits), *given[1:])

    # Before all other hooks: whoever watches a linear sees what it multiplies.
    return [module.get_submodule(name).register_forward_pre_hook(hook, prepend=True) for name in linears]


@contextmanager
def inputs_rounded(module: nn.Module, linears: Sequence[str], bits: int) -> Iterator[None]:
    """Do as `round_inputs` for a while."""
    handles = round_inputs(module, linears, bits)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
