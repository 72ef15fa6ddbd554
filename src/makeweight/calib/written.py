"""Calibration text that the model writes itself: more samples of what it knows, where those given are few.

Half of the pieces go on from where a given sample begins, so that they stay near its domain; half begin at a random
token, so that words which the given samples lack are met as well. Tokens are drawn from the model's own predictions,
unchanged. The whole model is in memory while it writes, unlike anywhere else.
Source: arXiv 2305.17888 (LLM-QAT, section 3.1) for text that begins at a random token.

Shapes: N samples, T tokens, P pieces, L tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from makeweight.calib.capture import place
from makeweight.calib.data import behind
from makeweight.errors import UserError
from makeweight.models.attention import speed_up
from makeweight.models.checkpoint import Checkpoint
from makeweight.numerics.memory import release_freed_memory
from makeweight.numerics.precision import fast_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 256
"""Tokens of a piece: long texts of small models repeat themselves, and every step reads all that came before."""
PROMPT = 32
"""Tokens of a given sample that a piece goes on from."""
TOGETHER = 64
"""Pieces that are written at once: fewer take longer, and more only more memory (LOG.md)."""

Tick = Callable[[int, int], None]


@torch.no_grad()
def written_tokens(
    ckpt: Checkpoint,
    given_NT: Tensor,
    count: int,
    *,
    device: torch.device,
    seed: int,
    start: int | None = None,
    tick: Tick | None = None,
) -> Tensor:
    """Return `count` samples as long as those given, int64 (count, T); the same seed gives the same on a machine.

    `start` is the token that every sample begins with, where there is one.
    """
    model, dtype = speed_up(ckpt.skeleton()), _dtype(device)
    for index in range(ckpt.n_blocks):
        place(ckpt.load_block(model, index), device, dtype)
    place(model, device, dtype)
    _lay_out_inputs_of_head(model)
    generator = torch.Generator().manual_seed(seed)
    length = min(PIECE, given_NT.shape[1])
    words = _words(ckpt)
    pieces = -(-count * given_NT.shape[1] // length)
    given_PL, single_P1 = _starts(given_NT, words, pieces, min(PROMPT, length // 2), generator)
    if start is not None:
        single_P1 = torch.cat([torch.full_like(single_P1, start), single_P1], 1)
    parts = [part for rows in (given_PL, single_P1) if len(rows) for part in rows.split(TOGETHER)]
    done = []
    for number, part in enumerate(parts):
        done.append(_continue(model, part.to(device), length, generator).cpu())
        if tick is not None:
            tick(number + 1, len(parts))
    del model
    release_freed_memory()
    pieces_PL = torch.cat(done)
    mixed = pieces_PL[torch.randperm(len(pieces_PL), generator=generator)]
    return behind(start, mixed.flatten()[: count * given_NT.shape[1]].view(count, -1))


def _lay_out_inputs_of_head(model: PreTrainedModel) -> None:
    """Give the head its inputs in one piece of memory.

    The last of several tokens are strided, and torch would repeat the whole head for every one of them.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))


def _dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the model while it writes: a narrow one is enough to draw from its predictions."""
    return fast_dtype(torch.bfloat16, device)


def writing_bytes(ckpt: Checkpoint, seqlen: int, device: torch.device) -> float:
    """Return bytes of the model, of keys and values of pieces written together, of logits."""
    config = ckpt.config.get_text_config()
    weights = sum(map(math.prod, ckpt.parameters().values()))
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    wide = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    cache = 2 * ckpt.n_blocks * TOGETHER * min(PIECE, seqlen) * heads * wide
    return (weights + cache) * _dtype(device).itemsize + 6 * 4 * TOGETHER * config.vocab_size


def _words(ckpt: Checkpoint) -> Tensor:
    """Return the tokens that stand for text."""
    tokenizer = ckpt.tokenizer()
    known = torch.arange(min(len(tokenizer), ckpt.config.get_text_config().vocab_size))
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return known[~torch.isin(known, torch.tensor(sorted(special), dtype=known.dtype))]


def _starts(
    given_NT: Tensor, words: Tensor, pieces: int, prompt: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what pieces begin with: the first tokens of samples, and single tokens of the whole vocabulary."""
    chosen = torch.arange(pieces // 2) % len(given_NT)
    drawn = torch.randint(len(words), (pieces - len(chosen), 1), generator=generator)
    return given_NT[chosen, :prompt], words[drawn]


def _continue(model: PreTrainedModel, start_PL: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Draw tokens until pieces are `length` long, int64 (P, L)."""
    from makeweight.models.cache import sized_cache  # brings transformers

    found, past, step_PL = [start_PL], sized_cache(model.config, length), start_PL
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for _ in range(length - start_PL.shape[1]):
        answer = model(input_ids=step_PL, past_key_values=past, use_cache=True, **last_only)
        past = getattr(answer, "past_key_values", None)
        if past is None:
            raise UserError(
                f"{type(model).__name__} keeps no keys and values to go on from, so it cannot write calibration text "
                "of its own: leave --written out."
            )
        step_PL = _drawn(answer.logits[:, -1].float().softmax(-1), generator)
        found.append(step_PL)
    return torch.cat(found, 1)


def _drawn(chances_PV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token of each row, int64 (P, 1); a fifth of multinomial's time on a CPU."""
    reached_PV = chances_PV.double().cumsum(-1)
    draw_P1 = torch.rand(len(chances_PV), 1, generator=generator, dtype=torch.float64).to(reached_PV.device)
    # right=True: never a token without a chance.
    return torch.searchsorted(reached_PV, draw_P1 * reached_PV[:, -1:], right=True)
