"""How well a model predicts texts: perplexity, and how far its predictions are from its original's.

Perplexity asks how likely a text is; a model that changed may find it likelier by luck. The divergence asks how much
of the original is left, whatever the text, and so tells apart what perplexity cannot (LOG.md).
Shapes: N windows, T tokens, C tokens at a time, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from makeweight.calib.capture import check_replay, find_device
from makeweight.calib.data import behind, check_tokens, evaluation_texts
from makeweight.errors import UserError
from makeweight.evals.predictions import Predictions, Progress, predict
from makeweight.numerics.precision import fast_dtype, name_of

if TYPE_CHECKING:
    from makeweight.models.load import Checkpoint

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts one text: exp of `nll`, the mean negative log-likelihood (nats) over the windows.

    `tokens` counts the text read (windows x seqlen); `seconds` is this text's share of a pass that may serve several.
    Where the model was compared with its original, `divergence` is the mean over tokens of KL(original || model) in
    nats, and `same_top` the share of tokens for which both think the same next one likeliest. `dtype` is that in which
    its blocks ran.
    """

    dataset: str
    perplexity: float
    nll: float
    windows: int
    tokens: int
    seqlen: int
    seconds: float
    divergence: float | None = None
    same_top: float | None = None
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model and the windows of tokens that it is to read, [N, T]; of each text so many."""

    ckpt: Checkpoint
    windows_NT: Tensor
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is read, and how: texts, windows of `seqlen` tokens (the first `windows`, one number or one each), device.

    `dtype` is that of the blocks (None: the checkpoint's own, float32 where the device has no units for that).
    """

    datasets: Sequence[str]
    seqlen: int = 2048
    windows: int | Sequence[int] | None = None
    device: str = "auto"
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str):
            raise UserError(f"datasets={self.datasets!r} is one text where a list of them belongs: put it in brackets.")
        object.__setattr__(self, "datasets", tuple(map(str, self.datasets)))

    def open(self, model: str) -> Opened:
        """Open a model and cut the texts into windows of its tokens; nothing is computed yet."""
        from makeweight.models.load import open_checkpoint

        ckpt = open_checkpoint(model, trust_remote_code=self.trust_remote_code)
        limit = getattr(ckpt.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and self.seqlen > limit:
            raise UserError(
                f"seqlen={self.seqlen} is longer than the {limit} positions of {ckpt.name}: give {limit} or less."
            )
        tokenizer = ckpt.tokenizer()
        if not self.datasets:
            raise UserError("no data set to evaluate on: name at least one, such as wikitext2.")
        texts = evaluation_texts(tokenizer, self.datasets, seqlen=self.seqlen, windows=self.windows)
        check_tokens(ckpt, *texts)
        windows_NT = behind(ckpt.start_token(tokenizer), torch.cat(texts))
        return Opened(ckpt=ckpt, windows_NT=windows_NT, counts=[len(text) for text in texts])

    def read(self, opened: Opened, progress: Progress | None = None) -> tuple[Predictions, list[int], float]:
        """Return a model's predictions, how many windows each text has, and the seconds that it took."""
        device, batch, ckpt = find_device(self.device), max(1, BATCH_TOKENS // self.seqlen), opened.ckpt
        check_replay(ckpt.skeleton(), ckpt.spec.blocks)
        start, dtype = time.perf_counter(), self.dtype or fast_dtype(ckpt.dtype, device)
        found = predict(ckpt, opened.windows_NT, dtype=dtype, device=device, batch=batch, progress=progress)
        return found, opened.counts, time.perf_counter() - start

    def results(
        self, ours: Predictions, counts: Sequence[int], seconds: float, theirs: Predictions | None = None
    ) -> list[Perplexity]:
        """Score predictions text by text, against another model's where these are given."""
        start = time.perf_counter()
        scores_N3 = torch.stack([_score(ours, window, theirs) for window in range(len(ours.tokens_NT))])
        seconds = (seconds + time.perf_counter() - start) / len(scores_N3)
        found: list[Perplexity] = []
        for name, count, part_N3 in zip(self.datasets, counts, scores_N3.split(list(counts)), strict=True):
            nll, divergence, same = part_N3.mean(0).tolist()
            size = {"windows": count, "tokens": count * self.seqlen, "seqlen": self.seqlen, "seconds": seconds * count}
            other = {} if theirs is None else {"divergence": divergence, "same_top": same}
            dtype = name_of(ours.hidden_NTD.dtype)
            found.append(Perplexity(dataset=name, perplexity=_exp(nll), nll=nll, **size, **other, dtype=dtype))
        return found


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

    `dtype` is that of the blocks (None: the checkpoint's own, float32 where the device has no units for that).
    Convention: the held-out part of each text is tokenised once and cut into adjacent windows of `seqlen`, of which
    the first `windows` count (one number, or one each). The mean over windows is the field's WikiText-2 figure (GPTQ
    and OmniQuant evaluation loops). Raises UserError.
    """
    texts = Texts(
        datasets=datasets,
        seqlen=seqlen,
        windows=windows,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return texts.results(*texts.read(texts.open(model), progress))


def compare(
    model: str, original: str, texts: Texts, progress: Progress | None = None
) -> tuple[list[Perplexity], list[Perplexity]]:
    """Evaluate a model and its original on the same texts: the model's results, with divergences, and the original's.

    The original's hidden states wait on the CPU while the model runs. Raises UserError as `evaluate` does, and for
    models that do not share a tokenizer or predict another number of tokens, before either runs.
    """
    first, second = texts.open(original), texts.open(model)
    if not torch.equal(first.windows_NT, second.windows_NT):
        raise UserError(f"{model} reads other tokens than {original}: compare models that share a tokenizer.")
    sizes = [opened.ckpt.config.get_text_config().vocab_size for opened in (second, first)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{model} predicts {sizes[0]} tokens and {original} {sizes[1]}: compare models with as many, such as a "
            "model and what was made of it."
        )
    theirs, counts, seconds = texts.read(first, _half(progress, 0))
    ours, our_counts, our_seconds = texts.read(second, _half(progress, 1))
    results = texts.results(ours, our_counts, our_seconds, theirs=theirs)
    return results, texts.results(theirs, counts, seconds)


def _half(progress: Progress | None, part: int) -> Progress | None:
    """Return the progress of one of two equal passes."""
    return None if progress is None else lambda done, total: progress(part * total + done, 2 * total)


def perplexity(
    ckpt: Checkpoint, windows_NT: Tensor, *, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 4
) -> float:
    """Perplexity over windows of tokens: exp of the mean over windows, inf where that is not finite."""
    return _exp(float(window_nll(ckpt, windows_NT, dtype=dtype, device=device, batch=batch).mean()))


def window_nll(
    ckpt: Checkpoint, windows_NT: Tensor, *, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 4
) -> Tensor:
    """Mean negative log-likelihood of the T - 1 targets of each window, in nats: float64 [N]."""
    found = predict(ckpt, windows_NT, dtype=dtype, device=device, batch=batch)
    return torch.stack([_score(found, window)[0] for window in range(len(windows_NT))])


@torch.no_grad()
def _score(ours: Predictions, window: int, theirs: Predictions | None = None) -> Tensor:
    """Return the mean cross entropy of one window, its divergence from another model's, and the share of equal tops."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    others = theirs.logits(window) if theirs is not None else None
    for logits_CV, targets_C in zip(ours.logits(window), ours.targets(window), strict=True):
        count += len(targets_C)
        if others is None:
            sums[0] += float(F.cross_entropy(logits_CV, targets_C, reduction="sum"))
            continue
        other_CV = F.log_softmax(next(others), -1)
        logits_CV = F.log_softmax(logits_CV, -1)
        sums[0] += float(F.nll_loss(logits_CV, targets_C, reduction="sum"))
        sums[1] += float(F.kl_div(logits_CV, other_CV, reduction="sum", log_target=True))
        sums[2] += float((logits_CV.argmax(-1) == other_CV.argmax(-1)).sum())
    return sums / count


def _exp(nll: float) -> float:
    """Perplexity of a mean loss; a broken model is a result (inf), not an error."""
    return math.exp(nll) if nll < 700 else math.inf
