"""Perplexity of a checkpoint, computed one block at a time, so that memory does not grow with depth.

Shapes: N windows, B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from makeweight.calib.capture import capture, find_device, finish, place, run_block
from makeweight.calib.data import behind, evaluation_texts
from makeweight.errors import UserError
from makeweight.numerics.grid import round_tokens
from makeweight.numerics.memory import release_freed_memory

if TYPE_CHECKING:
    from makeweight.models.load import Checkpoint

Progress = Callable[[int, int], None]
LOGIT_BYTES = 100_000_000
"""Float32 logits held at once; their log-softmax takes as much again."""
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts one text: exp of `nll`, the mean negative log-likelihood (nats) over the windows.

    `tokens` counts the text read (windows x seqlen); `seconds` is this text's share of a pass that may serve several.
    """

    dataset: str
    perplexity: float
    nll: float
    windows: int
    tokens: int
    seqlen: int
    seconds: float


def evaluate(
    model: str,
    *,
    datasets: Sequence[str],
    seqlen: int = 2048,
    windows: int | Sequence[int] | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity of a folder, hub name or GGUF file on each data set, with one pass over its blocks for all of them.

    `dtype` is that of the blocks (None: the checkpoint's own). Convention: the held-out part of each text is tokenised
    once and cut into adjacent windows of `seqlen`, of which the first `windows` count (one number, or one
    each). Raises UserError.
    """
    from makeweight.models.load import open_checkpoint

    where = find_device(device)
    ckpt = open_checkpoint(model, trust_remote_code=trust_remote_code)
    limit = getattr(ckpt.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise UserError(f"seqlen={seqlen} is longer than the {limit} positions of {ckpt.name}: give {limit} or less.")
    tokenizer = ckpt.tokenizer()
    if not datasets:
        raise UserError("no data set to evaluate on: name at least one, such as wikitext2.")
    texts = evaluation_texts(tokenizer, datasets, seqlen=seqlen, windows=windows)
    batch = max(1, BATCH_TOKENS // seqlen)
    start = time.perf_counter()
    windows_NT = behind(ckpt.start_token(tokenizer), torch.cat(texts))
    nll_N = window_nll(ckpt, windows_NT, dtype=dtype or ckpt.dtype, device=where, batch=batch, progress=progress)
    seconds = (time.perf_counter() - start) / len(nll_N)
    results: list[Perplexity] = []
    for name, text_NT, part_N in zip(datasets, texts, nll_N.split([len(text) for text in texts]), strict=True):
        nll, count = float(part_N.mean()), len(text_NT)
        results.append(
            Perplexity(
                name, _exp(nll), nll, windows=count, tokens=text_NT.numel(), seqlen=seqlen, seconds=seconds * count
            )
        )
    return results


def perplexity(
    ckpt: Checkpoint, windows_NT: Tensor, *, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 4
) -> float:
    """Perplexity over windows of tokens: exp of the mean of `window_nll`, inf where that is not finite."""
    return _exp(float(window_nll(ckpt, windows_NT, dtype=dtype, device=device, batch=batch).mean()))


@torch.no_grad()
def window_nll(
    ckpt: Checkpoint,
    windows_NT: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    batch: int = 4,
    progress: Progress | None = None,
) -> Tensor:
    """Mean negative log-likelihood of the T - 1 targets of each window, in nats: float64 [N].

    Blocks run in `dtype`, one in memory at a time; hidden states wait on the CPU in `dtype`; norm, head and cross
    entropy run in float32. `progress` is called with (blocks done, blocks + 1). The mean over windows is the field's
    WikiText-2 figure (GPTQ and OmniQuant evaluation loops).
    """
    device = torch.device(device)
    skeleton, path, total = ckpt.skeleton(), ckpt.spec.blocks, ckpt.n_blocks + 1
    # Never narrower than the file: the head still needs the stored precision.
    place(skeleton, device, torch.promote_types(ckpt.dtype, dtype))
    captured = capture(skeleton, path, windows_NT, dtype=dtype, batch_size=batch)
    hidden_NTD = captured.hidden_NTD
    for index, kwargs in enumerate(captured.kwargs):
        block = ckpt.load_block(skeleton, index)
        place(block, device, dtype)
        if ckpt.activations < 16:
            _round_inputs(block, ckpt.packed_linears(index), ckpt.activations)
        for chunk_BTD in hidden_NTD.split(batch):
            chunk_BTD.copy_(run_block(block, chunk_BTD.to(device), kwargs))
        ckpt.unload_block(skeleton, index)
        release_freed_memory()  # else the heap grows by a little with every block
        if progress is not None:
            progress(index + 1, total)
    place(skeleton, device, torch.float32)
    losses = [
        _nll(skeleton, path, h_TD.to(device), t_T.to(device)) for h_TD, t_T in zip(hidden_NTD, windows_NT, strict=True)
    ]
    if progress is not None:
        progress(total, total)
    return torch.tensor(losses, dtype=torch.float64)


def _round_inputs(block: nn.Module, linears: Sequence[str], bits: int) -> None:
    """Do to what enters the quantized linears what a runtime does."""
    for name in linears:
        block.get_submodule(name).register_forward_pre_hook(lambda _, given: (round_tokens(given[0], bits), *given[1:]))


def _nll(model: nn.Module, blocks_path: str, hidden_TD: Tensor, tokens_T: Tensor) -> float:
    """Mean cross entropy of one window, with as many logits at a time as `LOGIT_BYTES` allows."""
    vocabulary = int(getattr(model, "config").get_text_config().vocab_size)  # noqa: B009 - nn.Module has no config
    chunk = max(1, LOGIT_BYTES // (4 * vocabulary))
    total = 0.0
    for states_CD, targets_C in zip(hidden_TD[:-1].split(chunk), tokens_T[1:].split(chunk), strict=True):
        logits_CV = finish(model, blocks_path, states_CD.float()[None])[0].float()
        total += float(F.cross_entropy(logits_CV, targets_C, reduction="sum"))
    return total / (len(tokens_T) - 1)


def _exp(nll: float) -> float:
    """Perplexity of a mean loss; a broken model is a result (inf), not an error."""
    return math.exp(nll) if nll < 700 else math.inf
