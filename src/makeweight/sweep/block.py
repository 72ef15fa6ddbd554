"""One block of the network as a function of its weights; the Hugging Face module is never edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from makeweight.calib.capture import for_batch, hidden_of, run_block
from makeweight.methods.base import State
from makeweight.models.activations import inputs_rounded, round_inputs


@dataclass(frozen=True)
class Block:
    """A loaded decoder layer, the linears to quantize, and the keyword arguments it is called with.

    `activations` is the number of bits to which these linears round what enters them once the block runs with other
    weights than its own.
    """

    index: int
    module: nn.Module
    linears: tuple[str, ...]
    kwargs: Mapping[str, Any]
    activations: int = 16

    def __call__(self, hidden_BTD: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the block, shape (B, T, D), where given with other weights, by name of a linear or of a parameter."""
        if weights is None:
            return run_block(self.module, hidden_BTD, self.kwargs)
        kwargs = for_batch(self.kwargs, len(hidden_BTD))
        with inputs_rounded(self.module, self.linears, self.activations):
            return hidden_of(functional_call(self.module, self._named(weights), (hidden_BTD,), kwargs))

    def state(self) -> State:
        """Return fp32 copies of the weights to quantize, as the block holds them."""
        return {name: self.module.get_submodule(name).weight.detach().float().clone() for name in self.linears}  # pyright: ignore[reportCallIssue,reportAttributeAccessIssue]

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights, by name of a linear or of a parameter, for good and once."""
        named = {name: weight.detach() for name, weight in self._named(weights).items()}
        self.module.load_state_dict(named, strict=False, assign=True)
        round_inputs(self.module, self.linears, self.activations)

    def drop(self, names: Iterable[str]) -> None:
        """Let go of weights that something else stands for; the block then runs with weights given only."""
        for name in names:
            self.module.get_submodule(name).weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def _named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name every weight as the parameter that it replaces."""
        return {f"{name}.weight" if name in self.linears else name: weight for name, weight in weights.items()}
