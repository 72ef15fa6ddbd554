"""Hidden states that travel through the network: one stream through the original, one through the quantized blocks.

Shapes: N samples, T tokens, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


@torch.no_grad()
def advance(
    layer: Layer, hidden_NTD: Tensor, *, batch_size: int, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """Run all samples through a layer, batch by batch, shape (N, T, D) on the CPU in the same dtype.

    `out` is what is overwritten with the result; it may be what came in.
    """
    output_NTD = torch.empty_like(hidden_NTD) if out is None else out
    for start in range(0, hidden_NTD.shape[0], batch_size):
        part = slice(start, start + batch_size)
        output_NTD[part] = layer(hidden_NTD[part].to(device)).to(output_NTD)
    return output_NTD


class Stream:
    """The quantized stream at the current block, and the original's outputs from the current block on.

    Memory is (2 + ahead) N T D values, whatever the depth of the network and also on the way through a block: the
    quantized stream is written over `hidden_NTD`, which belongs to it from now on, and new targets over passed ones.
    """

    def __init__(self, hidden_NTD: Tensor, *, batch_size: int, device: torch.device) -> None:
        self.quantized_NTD = hidden_NTD
        self._front_NTD = hidden_NTD
        self._targets: deque[Tensor] = deque()
        self._passed_NTD: Tensor | None = None
        self._batch_size, self._device = batch_size, device

    def targets(self, layers: tuple[Layer, ...]) -> tuple[Tensor, ...]:
        """Return what the original network gives after each of these layers, the current one first.

        Only layers not yet passed are run: one for each new block.
        """
        for layer in layers[len(self._targets) :]:
            # With nothing ahead what was passed is the front itself, which may be overwritten as it is read.
            self._front_NTD = self._through(layer, self._front_NTD, self._passed_NTD)
            self._passed_NTD = None
            self._targets.append(self._front_NTD)
        return tuple(self._targets)

    def step(self, committed: Layer) -> None:
        """Pass the current block: the quantized stream goes through its committed weights."""
        self._passed_NTD = self._targets.popleft()
        self._through(committed, self.quantized_NTD, self.quantized_NTD)

    def _through(self, layer: Layer, hidden_NTD: Tensor, out: Tensor | None) -> Tensor:
        return advance(layer, hidden_NTD, batch_size=self._batch_size, device=self._device, out=out)
