"""After the walk: what the quantized network may still learn as a whole, judged by the original's predictions.

Or by the text, where a step asks for that. The original's last hidden states are computed once. The quantized network
runs block by block with its activations recomputed in the backward pass, so that memory is that of all codes, which may
be mapped from a file, the hidden states between blocks, and one block; a step may ask to keep activations instead.
Shapes: N samples, B batch, T tokens, M = B * T, D hidden, C tokens at a time, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from makeweight.calib.capture import capture, finish, place
from makeweight.calib.stream import advance
from makeweight.errors import UserError
from makeweight.methods.base import Context, FinetuneStep, Learnables, Params, Refinement
from makeweight.models.attention import speed_up
from makeweight.models.checkpoint import Checkpoint
from makeweight.numerics.memory import release_freed_memory
from makeweight.numerics.qtensor import QTensor
from makeweight.sweep import heldout
from makeweight.sweep.block import Block
from makeweight.sweep.descent import Descent

LOGIT_BYTES = 1 << 24
"""Logits that are held at a time, fp32, unless a vocabulary is so large that these are too few tokens."""
LEAST_TOGETHER, LEAST_ON_GPU = 64, 512
"""Tokens whose logits are held together at the least: the whole head is read for them, however few they are."""
CHECKS = 5
MAX_HALVINGS = 3
AT_ONCE = 4
"""Steps' samples that go through the network together where nothing is learned from them."""

Solved = Mapping[int, tuple[dict[str, QTensor], Params]]
"""Codes and other parameters of the quantized blocks."""
Save = Callable[[dict[str, Tensor]], None]


@dataclass
class Progress:
    """How far learning has come; all that is needed to go on besides tensors."""

    step: int = 0
    rate: float = 1.0
    halvings: int = 0
    start: float = math.nan
    best: float = math.inf
    best_step: int = 0
    seconds: float = 0.0


class Finetune:
    """The whole network with what is learned in its quantized blocks."""

    def __init__(
        self,
        ckpt: Checkpoint,
        step: FinetuneStep,
        solved: Solved,
        tokens_NT: Tensor,
        context: Context,
        *,
        device: torch.device,
        seed: int,
    ) -> None:
        began = time.perf_counter()
        self.ckpt, self.step, self.solved, self.device = ckpt, step, solved, device
        used, self.held_out, self.queue = _drawn(len(tokens_NT), step, seed)
        self.skeleton = speed_up(ckpt.skeleton()).requires_grad_(False)
        place(self.skeleton, device, context.dtype)
        captured = capture(self.skeleton, ckpt.spec.blocks, tokens_NT[used], dtype=context.dtype)
        self.tokens_NT, self.first_NTD = tokens_NT[used], captured.hidden_NTD
        self.last_NTD = captured.hidden_NTD.clone() if step.target == "logits" else None
        self.blocks: list[Block] = []
        self.parts = nn.ModuleDict()
        for index, kwargs in enumerate(captured.kwargs):
            module = ckpt.load_block(self.skeleton, index).requires_grad_(False)
            place(module, device, context.dtype)
            block = Block(index, module, ckpt.linears(), kwargs, context.scheme.activations)
            if self.last_NTD is not None:
                advance(block, self.last_NTD, batch_size=AT_ONCE * step.batch_size, device=device, out=self.last_NTD)
            if index in solved:
                codes, rest = solved[index]
                codes = {name: tensor.to(device) for name, tensor in codes.items()}
                rest = {name: tensor.to(device) for name, tensor in rest.items()}
                self.parts[str(index)] = step.build(codes, rest, context).to(device)
                block.drop(codes)
            self.blocks.append(block)
            release_freed_memory()
        self.descent = Descent(self.learnables(), step.steps)
        self.at, self.best = Progress(seconds=time.perf_counter() - began), self._values()

    def refinements(self) -> dict[int, Refinement]:
        """Return what is learned, by block."""
        return {int(index): part for index, part in self.parts.items() if isinstance(part, Refinement)}

    def learnables(self) -> list[Learnables]:
        """Return the learnables of all blocks."""
        return [group for part in self.refinements().values() for group in part.learnables()]

    def run(self, save: Save | None = None, tick: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Learn, or go on learning, and leave everything in the best state seen, never worse than it began.

        `save` gets what `restore` takes, several times. Returns what to report: losses on held-out text are nats for
        each token.
        """
        every, began = -(-self.step.steps // CHECKS), time.perf_counter() - self.at.seconds
        if math.isnan(self.at.start):
            self.at.start = self.at.best = self._check()
        while self.at.step < self.step.steps and self.learnables():
            self.at.step += 1
            finite = self._learn()
            release_freed_memory()  # costs no time beside a step, and a tenth of the peak is what the heap kept
            if finite and (self.at.step % every == 0 or self.at.step == self.step.steps):
                error = self._check()
                if error < self.at.best:
                    self.at.best, self.at.best_step, self.best = error, self.at.step, self._values()
                finite = math.isfinite(error)
                self.at.seconds = time.perf_counter() - began
                if save is not None and finite:
                    save(self.state())
            if not finite:
                self._back_off()
            if tick is not None:
                tick(self.at.step, self.step.steps)
        self._take(self.best)
        seconds = time.perf_counter() - began
        return {"before": self.at.start, "after": self.at.best, "best_step": self.at.best_step, "seconds": seconds}

    @torch.no_grad()
    def freeze(self) -> dict[str, Tensor]:
        """Return what may have changed, by block and name, as it is stored: scales, codes that moved, the rest."""
        found: dict[str, Tensor] = {}
        for index, part in self.refinements().items():
            codes, _ = self.solved[index]
            for name, held in part.freeze().items():
                found[f"{index}.{name}"] = held.scale_OG
                if not torch.equal(held.codes_OI.cpu(), codes[name].codes_OI.cpu()):
                    found[f"{index}.{name}.codes"] = held.codes_OI
            found |= {f"{index}.{name}": tensor for name, tensor in part.learned_rest().items()}
        return {name: tensor.cpu() for name, tensor in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Return all that decides how learning goes on."""
        found = {f"now.{name}": value for name, value in self._values().items()}
        found |= {f"best.{name}": value for name, value in self.best.items()}
        found |= {f"descent.{name}": value for name, value in self.descent.state().items()}
        values = vars(self.at).values()
        return {**found, "progress": torch.tensor([float(value) for value in values], dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self._take(under("now."))
        self.best = under("best.")
        self.descent.restore(under("descent."))
        kinds = [type(value) for value in vars(Progress()).values()]
        self.at = Progress(*(kind(value) for kind, value in zip(kinds, state["progress"].tolist(), strict=True)))

    def _learn(self) -> bool:
        """Take one step; return False, with nothing moved, where the loss is not finite."""
        start = (self.at.step - 1) * self.step.batch_size
        loss = self._loss(self.queue[start : start + self.step.batch_size])
        if not math.isfinite(loss.item()):
            return False
        self.descent.zero_grad()
        loss.backward()
        self.descent.step(self.at.step, self.at.rate)
        with torch.no_grad():
            for part in self.refinements().values():
                part.constrain()
        return True

    @torch.no_grad()
    def _check(self) -> float:
        parts = self.held_out.split(AT_ONCE * self.step.batch_size)
        return sum(self._loss(part).item() * len(part) for part in parts) / len(self.held_out)

    def _loss(self, index: Tensor) -> Tensor:
        """Return how far predictions for some samples are from what the step holds them to, nats for each token."""
        hidden_BTD, refinements = self.first_NTD[index].to(self.device), self.refinements()
        for block in self.blocks:
            part = refinements.get(block.index)
            if self.step.recompute:
                hidden_BTD = checkpoint(_run, block, part, hidden_BTD, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_BTD = _run(block, part, hidden_BTD)
        sought, loss = self.last_NTD, self._divergence
        if sought is None:
            hidden_BTD, sought, loss = hidden_BTD[:, :-1], self.tokens_NT[:, 1:], self._surprise
        sought = sought[index].flatten(0, 1).to(self.device)
        tokens = len(sought)
        chunk = logit_tokens(self.ckpt.config.get_text_config().vocab_size, self.device)
        chunk = min(chunk, hidden_BTD.shape[1])  # models with learned positions take no longer text
        total = _InParts.apply(hidden_BTD.flatten(0, 1), sought, loss, chunk)
        assert isinstance(total, Tensor)
        return total / tokens

    def _divergence(self, ours_CD: Tensor, theirs_CD: Tensor) -> Tensor:
        """Return the sum over tokens of the Kullback-Leibler divergence from the original's predictions."""
        ours_CV, theirs_CV = (
            F.log_softmax(finish(self.skeleton, self.ckpt.spec.blocks, states[None])[0].float(), dim=-1)
            for states in (ours_CD, theirs_CD)
        )
        return F.kl_div(ours_CV, theirs_CV, reduction="sum", log_target=True)

    def _surprise(self, ours_CD: Tensor, next_C: Tensor) -> Tensor:
        """Return the sum over tokens of the negative log probability of the token that comes next."""
        logits_CV = finish(self.skeleton, self.ckpt.spec.blocks, ours_CD[None])[0].float()
        return F.cross_entropy(logits_CV, next_C, reduction="sum")

    def _values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parts.named_parameters()}

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parts.named_parameters():
            parameter.copy_(values[name])

    def _back_off(self) -> None:
        self.at.halvings, self.at.rate = self.at.halvings + 1, self.at.rate / 2
        if self.at.halvings > MAX_HALVINGS:
            raise UserError(
                f"the loss of the whole network is not finite at step {self.at.step} even at "
                f"{2 * self.at.rate:.3g} times the learning rates; start again with lower ones (--lr e2e=VALUE) "
                "and another --out."
            )
        self._take(self.best)
        self.descent = Descent(self.learnables(), self.step.steps)


def steps_taken(state: Mapping[str, Tensor]) -> int:
    """Return how many steps a state of `Finetune` has behind it."""
    return int(state["progress"][0])


def logit_tokens(vocabulary: int, device: torch.device) -> int:
    """Return for how many tokens logits are held at a time."""
    return max(LOGIT_BYTES // (4 * vocabulary), LEAST_TOGETHER if device.type == "cpu" else LEAST_ON_GPU)


def _drawn(samples: int, step: FinetuneStep, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples that are used at all, and among these those held out, and those learned from in order."""
    held, train = heldout.split(samples, seed)
    drawn, generator = step.steps * step.batch_size, torch.Generator().manual_seed(seed)
    epochs = [train[torch.randperm(len(train), generator=generator)] for _ in range(-(-drawn // len(train)))]
    used, places = torch.cat([held, *epochs])[: len(held) + drawn].unique(return_inverse=True)
    return used, places[: len(held)], places[len(held) :]


class _InParts(torch.autograd.Function):
    """A sum over tokens whose logits are in memory for a part at a time; its slope is taken on the way."""

    @staticmethod
    def forward(
        ctx: Any, ours_MD: Tensor, sought: Tensor, loss: Callable[[Tensor, Tensor], Tensor], chunk: int
    ) -> Tensor:
        total, slopes = ours_MD.new_zeros((), dtype=torch.float32), []
        for ours_CD, sought_part in zip(ours_MD.split(chunk), sought.split(chunk), strict=True):
            leaf_CD = ours_CD.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                part = loss(leaf_CD, sought_part)
            total += part.detach()
            if ctx.needs_input_grad[0]:
                slopes += torch.autograd.grad(part, leaf_CD)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_MD,) = ctx.saved_tensors
        return (grads[0] * slope_MD).to(slope_MD.dtype), None, None, None


def _run(block: Block, part: Refinement | None, hidden_BTD: Tensor) -> Tensor:
    return block(hidden_BTD, None if part is None else part())
