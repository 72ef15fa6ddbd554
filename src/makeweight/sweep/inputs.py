"""What enters the linears of a block: which of them read the same tensor, and the second moments of what they read.

Shapes: N samples, B batch, T tokens, D hidden, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from makeweight.calib.walk import StopForward
from makeweight.sweep.block import Block


@dataclass
class Moments:
    """The second moments of what a block's linears read, or their squares, in one pass once the first is asked for."""

    block: Block
    weights: Mapping[str, Tensor]
    hidden_NTD: Tensor
    batch_size: int
    device: torch.device
    found: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def moment(self, name: str) -> Tensor:
        """Return the mean over tokens of x x^T for the inputs x of a linear, (I, I) fp32.

        A linear that no token reaches, as some expert may be, is judged as if its inputs were independent of each
        other and of one size: every weight counts the same.
        """
        if not self.found:
            self.gather(shared_inputs(self.block, self.hidden_NTD[:1].to(self.device)))
        return self.found[name]

    def square(self, name: str) -> Tensor:
        """Return the mean over tokens of x^2 for the inputs x of a linear, (I,) fp32; all ones where no token comes."""
        if not self.squares:
            self.gather(shared_inputs(self.block, self.hidden_NTD[:1].to(self.device)), products=False)
        return self.squares[name]

    @torch.no_grad()
    def gather(self, groups: Sequence[Sequence[str]], *, products: bool = True) -> None:
        """Find the moments of groups of linears, each of which reads one tensor, or without `products` the squares.

        What the block would do after the last of them is left out.
        """
        sums: dict[str, Tensor] = {}
        waiting: set[str] = set()

        def add(name: str, given: Tensor) -> None:
            rows = given.reshape(-1, given.shape[-1]).float()
            width = rows.shape[1]
            if name not in sums:
                sums[name] = torch.zeros((width, width) if products else (width,), device=rows.device)
            if products:
                sums[name].addmm_(rows.T, rows)
            else:
                sums[name] += rows.square().sum(0)
            waiting.discard(name)
            if not waiting:
                raise StopForward

        with _on_inputs(self.block, [names[0] for names in groups], add):
            for part_BTD in self.hidden_NTD.split(self.batch_size):
                waiting |= {names[0] for names in groups}
                with suppress(StopForward):
                    self.block(part_BTD.to(self.device), self.weights)
        tokens = self.hidden_NTD.shape[0] * self.hidden_NTD.shape[1]
        found = self.found if products else self.squares
        for names in groups:
            mean = sums[names[0]] / tokens if names[0] in sums else self._independent(names[0], products=products)
            found.update(dict.fromkeys(names, mean))

    def _independent(self, name: str, *, products: bool) -> Tensor:
        linear = self.block.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        ones_I = torch.ones(linear.in_features, device=self.device)
        return ones_I.diag() if products else ones_I


@torch.no_grad()
def shared_inputs(block: Block, hidden_BTD: Tensor) -> list[list[str]]:
    """Return the linears in the order in which they are called, those that read the same tensor together.

    Linears that are not called for these hidden states follow one by one.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, given: Tensor) -> None:
        for tensor, names in seen:
            if tensor is given:
                names.append(name)
                return
        seen.append((given, [name]))

    with _on_inputs(block, block.linears, note):
        block(hidden_BTD)
    called = [names for _, names in seen]
    return called + [[name] for name in block.linears if not any(name in names for names in called)]


@contextmanager
def _on_inputs(block: Block, names: Sequence[str], act: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `act` with the name and the input of each of these linears whenever it is called."""

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            act(name, given[0])

        return block.module.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
