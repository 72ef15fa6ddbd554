"""What a checkpoint predicts of some windows, computed one block at a time, so that memory does not grow with depth.

Shapes: N windows, B batch, T tokens, D hidden, C tokens at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from makeweight.calib.capture import capture, finish, place, run_block
from makeweight.models.activations import round_inputs
from makeweight.numerics.memory import release_freed_memory

if TYPE_CHECKING:
    from makeweight.models.load import Checkpoint

Progress = Callable[[int, int], None]
LOGIT_BYTES = 100_000_000
"""Float32 logits held at once; their log-softmax takes as much again."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Hidden states of all windows after the last block, and the norm and head, in fp32, that turn them into logits."""

    skeleton: nn.Module
    blocks_path: str
    tokens_NT: Tensor
    hidden_NTD: Tensor
    device: torch.device

    @property
    def chunk(self) -> int:
        """Tokens whose logits are held at once."""
        vocabulary = int(getattr(self.skeleton, "config").get_text_config().vocab_size)  # noqa: B009 - nn.Module has no config
        return max(1, LOGIT_BYTES // (4 * vocabulary))

    @torch.no_grad()
    def logits(self, window: int) -> Iterator[Tensor]:
        """Yield the logits of a window's tokens but the last, `chunk` at a time, fp32 [C, V]."""
        for states_CD in self.hidden_NTD[window, :-1].split(self.chunk):
            states_1CD = states_CD.to(self.device).float()[None]
            yield finish(self.skeleton, self.blocks_path, states_1CD)[0].float()

    def targets(self, window: int) -> Iterator[Tensor]:
        """Yield the tokens that `logits` predict, [C]."""
        yield from self.tokens_NT[window, 1:].to(self.device).split(self.chunk)


@torch.no_grad()
def predict(
    ckpt: Checkpoint,
    windows_NT: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    batch: int = 4,
    progress: Progress | None = None,
) -> Predictions:
    """Send windows through all blocks.

    Blocks run in `dtype`, one in memory at a time; hidden states wait on the CPU in `dtype`; norm and head run in
    float32. `progress` is called with (blocks done, blocks).
    """
    device = torch.device(device)
    skeleton, path = ckpt.skeleton(), ckpt.spec.blocks
    # Never narrower than the file: the head still needs the stored precision.
    place(skeleton, device, torch.promote_types(ckpt.dtype, dtype))
    captured = capture(skeleton, path, windows_NT, dtype=dtype, batch_size=batch)
    hidden_NTD = captured.hidden_NTD
    for index, kwargs in enumerate(captured.kwargs):
        block = ckpt.load_block(skeleton, index)
        place(block, device, dtype)
        if ckpt.activations < 16:
            round_inputs(block, ckpt.packed_linears(index), ckpt.activations)
        for chunk_BTD in hidden_NTD.split(batch):
            chunk_BTD.copy_(run_block(block, chunk_BTD.to(device), kwargs))
        ckpt.unload_block(skeleton, index)
        release_freed_memory()  # else the heap grows by a little with every block
        if progress is not None:
            progress(index + 1, ckpt.n_blocks)
    place(skeleton, device, torch.float32)
    return Predictions(skeleton=skeleton, blocks_path=path, tokens_NT=windows_NT, hidden_NTD=hidden_NTD, device=device)
