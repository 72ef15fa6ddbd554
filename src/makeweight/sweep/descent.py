"""How learnables move: AdamW, or the sign of the gradient, each with a rate that falls over the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from makeweight.methods.base import Learnables

FINAL_RATE = 0.05
"""Share of the learning rate that the cosine schedule ends with."""


class Descent:
    """Steps all learnables, each group by its own rule; a new one begins without memory."""

    def __init__(self, learnables: Iterable[Learnables], steps: int) -> None:
        self.steps = steps
        groups: dict[str, list[dict[str, Any]]] = {"adam": [], "sign": []}
        for group in learnables:
            rate = group.rate * group.unit
            how = {"betas": group.betas} if group.descent == "adam" else {}
            groups[group.descent].append({"params": list(group.params), "lr": rate, "base_rate": rate, **how})
        self.parts: list[tuple[torch.optim.Optimizer, bool]] = []
        if groups["adam"]:
            # Losses are relative errors of a few percent spread over many parameters: gradients near AdamW's usual eps.
            adam = torch.optim.AdamW(groups["adam"], weight_decay=0.0, eps=1e-12, fused=True)
            self.parts.append((adam, False))
        if groups["sign"]:
            self.parts.append((Sign(groups["sign"]), True))

    def zero_grad(self) -> None:
        """Forget gradients."""
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def step(self, number: int, share: float = 1.0) -> None:
        """Take step `number`, of 1 to `steps`, at a share of the rates that the schedules give."""
        for optimizer, straight in self.parts:
            fall = self._straight(number) if straight else self._cosine(number)
            for group in optimizer.param_groups:
                group["lr"] = group["base_rate"] * fall * share
            optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the moments, by optimiser, position of the parameter and name."""
        return {
            f"{place}.{position}.{name}": value
            for place, (optimizer, _) in enumerate(self.parts)
            for position, parameter in enumerate(_params(optimizer))
            for name, value in optimizer.state[parameter].items()
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take moments that `state` gave."""
        for key, value in state.items():
            place, position, name = key.split(".", 2)
            optimizer = self.parts[int(place)][0]
            parameter = _params(optimizer)[int(position)]
            optimizer.state[parameter][name] = value.to(parameter.device, copy=True)

    def _cosine(self, number: int) -> float:
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * (number - 1) / self.steps))

    def _straight(self, number: int) -> float:
        return 1 - (number - 1) / self.steps


def _params(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Sign(torch.optim.Optimizer):
    """Moves every parameter by the rate against the sign of its gradient (SignRound, arXiv 2309.05516)."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=group["lr"])
