"""The optimiser loop of a block: learn a chain so that outputs, here and some blocks later, stay what they were.

Shapes: N samples, B batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.numerics.flips import Curvature
from makeweight.sweep import heldout
from makeweight.sweep.chain import Chain
from makeweight.sweep.curvature import PROBES, curvature
from makeweight.sweep.descent import Descent
from makeweight.sweep.judge import Judge

MAX_HALVINGS = 3
MOST_JUDGING = 32
"""Pieces of held-out samples that judge a block: they are enough to tell its states apart, and judge several times."""
AVERAGED = 0.25
"""The share of the steps, at the end, whose mean state is tried as well: small batches make states wander about it."""


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What learning did to one block; errors are relative, on samples held out of training."""

    error_before: float
    error_after: float
    best_step: int
    halvings: int
    averaged: bool = False
    """Whether what was kept is the mean of the last states."""


def judging(samples: int, pieces: int) -> int:
    """Return how many pieces judge a block's states, of samples in so many pieces each."""
    return min(MOST_JUDGING, len(heldout.split(samples, 0, pieces=pieces)[0]))


class Fit:
    """One block's learning: batches, schedule, checks on held-out samples, best or mean state, rollback."""

    def __init__(
        self,
        chain: Chain,
        judge: Judge,
        hidden_NTD: Tensor,
        targets: Sequence[Tensor],
        *,
        steps: int,
        batch_size: int,
        checks: int,
        seed: int,
        pieces: int = 1,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self.chain, self.judge, self.hidden, self.targets = chain, judge, hidden_NTD, targets
        self.steps, self.batch_size, self.tick = steps, batch_size, tick
        self.every = max(1, math.ceil(steps / max(1, checks)))
        self.seed = (seed * 1_000_003 + judge.blocks[0].index) % 2**63
        self.generator = torch.Generator().manual_seed(self.seed)
        held, train = heldout.split(len(hidden_NTD) // pieces, seed, pieces=pieces)
        self.held_out, self.train = held[:MOST_JUDGING], train[torch.randperm(len(train), generator=self.generator)]
        self.queue: list[int] = []

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn, and any step to learn it in."""
        return self.steps > 0 and any(True for _ in self.chain.learnables())

    def run(self) -> FitReport:
        """Learn in place and leave the chain in the best state seen, never worse than it began."""
        start = best = self._check()
        if not self.learns:
            return FitReport(error_before=start, error_after=start, best_step=0, halvings=0)
        kept, best_step, rate, halvings, step = self._snapshot(), 0, 1.0, 0, 0
        self.chain.quantizer.take_curvature(self._curvature)
        descent, mean = Descent(self.chain.learnables(), self.steps), _Mean()
        while step < self.steps:
            step += 1
            finite = self._step(descent, step, rate)
            if finite and (step % self.every == 0 or step == self.steps):
                error = self._check()
                finite = math.isfinite(error)
                if error < best:
                    best, best_step, kept = error, step, self._snapshot()
            if not finite:
                halvings, rate = halvings + 1, rate / 2
                self._give_up(halvings, step, rate)
                self.chain.load_state_dict(kept)
                descent, mean = Descent(self.chain.learnables(), self.steps), _Mean()
            if step > self.steps * (1 - AVERAGED):
                mean.add(self.chain.state_dict())
            if self.tick is not None:
                self.tick()
        self.chain.load_state_dict(mean.state)
        error = self._check()
        averaged = error < best
        if not averaged:
            self.chain.load_state_dict(kept)
        return FitReport(
            error_before=start,
            error_after=error if averaged else best,
            best_step=self.steps if averaged else best_step,
            halvings=halvings,
            averaged=averaged,
        )

    def _step(self, descent: Descent, number: int, rate: float) -> bool:
        """Take one step; return False, with nothing moved, where the loss is not finite."""
        index = self._batch()
        hidden_BTD = self.hidden[index].to(self.judge.device)
        errors = self.judge.errors(self.chain(), hidden_BTD, [t[index] for t in self.targets])
        loss = self.judge.loss(errors)
        if not math.isfinite(loss.item()):
            return False
        descent.zero_grad()
        loss.backward()
        descent.step(number, rate)
        with torch.no_grad():
            self.chain.constrain()
        return True

    def _curvature(self) -> dict[str, Curvature]:
        """Return how the loss bends where learning begins, on some of the samples."""
        count = min(len(self.train), PROBES * self.batch_size)
        batches = self.train[:count].split(self.batch_size)  # in random order already
        with torch.no_grad():
            weights = self.chain()
        return curvature(self.judge, weights, self.hidden, self.targets, batches, self.seed)

    def _check(self) -> float:
        with torch.no_grad():
            return self.error(self.chain())

    @torch.no_grad()
    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Return the loss on the held-out samples of a block that is run with `weights`."""
        total = 0.0
        for part in self.held_out.split(self.batch_size):
            errors = self.judge.errors(
                weights, self.hidden[part].to(self.judge.device), [t[part] for t in self.targets]
            )
            total += self.judge.loss(errors).item() * len(part)
        return total / len(self.held_out)

    def _batch(self) -> Tensor:
        """Draw samples without replacement, a new order each epoch."""
        while len(self.queue) < min(self.batch_size, len(self.train)):
            self.queue += self.train[torch.randperm(len(self.train), generator=self.generator)].tolist()
        index, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return torch.tensor(index)

    def _snapshot(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.chain.state_dict().items()}

    def _give_up(self, halvings: int, step: int, rate: float) -> None:
        if halvings > MAX_HALVINGS:
            rates = " ".join(f"{g.name}={g.rate * rate * 2:.3g}" for g in self.chain.learnables())
            raise UserError(
                f"block {self.judge.blocks[0].index}: the loss is not finite at step {step} even at learning rates "
                f"{rates}; start again with lower ones (--set) or without the method that learns fastest, "
                "and another --out."
            )


class _Mean:
    """The running mean of states; what is not a floating-point number is that of the last."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, state: Mapping[str, Tensor]) -> None:
        self.count += 1
        for key, value in state.items():
            if key in self.state and value.is_floating_point():
                self.state[key].lerp_(value, 1 / self.count)
            else:
                self.state[key] = value.detach().clone()
