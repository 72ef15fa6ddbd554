"""One block of the network as a function of its weights; the Hugging Face module is never edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from makeweight.calib.capture import hidden_of
from makeweight.methods.base import State


@dataclass(frozen=True)
class Block:
    """A loaded decoder layer, the linears to quantize, and the keyword arguments it is called with."""

    index: int
    module: nn.Module
    linears: tuple[str, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, hidden_BTD: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the block, with other weights (linear name to (O, I)) where given, shape (B, T, D)."""
        if weights is None:
            return hidden_of(self.module(hidden_BTD, **self.kwargs))
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        return hidden_of(functional_call(self.module, named, (hidden_BTD,), dict(self.kwargs)))

    def state(self) -> State:
        """Return fp32 copies of the weights to quantize."""
        return {name: self.module.get_submodule(name).weight.detach().float().clone() for name in self.linears}  # pyright: ignore[reportCallIssue,reportAttributeAccessIssue]

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the block's weights for good."""
        for name, weight in weights.items():
            linear = self.module.get_submodule(name)
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
