"""Learning lowers the error on samples it has not seen, or leaves the block as it was, and ends in a sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from makeweight.errors import UserError
from makeweight.methods.base import GridStep, MapStep
from makeweight.methods.grid.clip import Lwc, Rtn
from makeweight.methods.grid.rounding import Rounding
from makeweight.methods.grid.stepsize import StepSize
from makeweight.methods.presets import PRESETS
from makeweight.methods.weight.sde import Sde
from makeweight.methods.weight.tune import Tune
from makeweight.sweep.chain import Chain
from makeweight.sweep.descent import FINAL_RATE, Descent
from makeweight.sweep.judge import Judge
from tests.sweep.problem import Problem, problem

CL = (1.0, 0.5)
SCHEME = "W2A16g32"


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem(scheme=SCHEME, samples=32)


def digests(chain: Chain) -> list[str]:
    return [quantized.digest() for quantized in chain.freeze().codes.values()]


def learned(chain: Chain) -> list[Tensor]:
    return [value.clone() for value in chain.state_dict().values()]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("weights", [(1.0,), CL], ids=["mse", "cl"])
@pytest.mark.parametrize("steps", [(), (Sde(band=2),)], ids=["lwc", "lwc+sde"])
def test_lowers_the_held_out_error(case: Problem, steps: tuple[MapStep, ...], weights: tuple[float, ...]) -> None:
    fit = case.fit(case.chain(*steps), weights, steps=48)
    before = case.held_out_error(fit)
    report = fit.run()
    assert report.error_before == pytest.approx(before, rel=1e-6)
    assert report.error_after < (0.95 if steps else 0.99) * before
    assert report.error_after == pytest.approx(case.held_out_error(fit), rel=1e-6)
    assert report.best_step % 12 == 0 and report.best_step > 0 and report.halvings == 0


LEARNERS: dict[str, tuple[tuple[MapStep, ...], GridStep]] = {
    "lwc": ((), Lwc()),
    "stepsize": ((), StepSize()),
    "autoround": ((), Rounding()),
    "autoround by AdamW": ((), Rounding(descent="adam")),
    "flipround": ((), PRESETS["flipround"].step),  # pyright: ignore[reportAssignmentType]
    "rtn+tune": ((Tune(),), Rtn()),
    "efficientqat": ((Tune(),), StepSize()),
    "rtn+sde": ((Sde(),), Rtn()),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_each_learns_at_its_own_rate(case: Problem, name: str) -> None:
    """A rate a hundred times too small would leave 0.97 of the error at the least."""
    longer = replace(case, context=replace(case.context, steps=48))
    steps, grid = LEARNERS[name]
    report = longer.fit(longer.chain(*steps, grid=grid), steps=48).run()
    assert report.best_step > 0 and report.error_after < 0.95 * report.error_before


def test_the_same_input_has_a_target_of_its_own(case: Problem) -> None:
    """Its error stands beside those of the loss, weighed, at the end of the first block."""
    judge = replace(case.judge(CL), same_input=0.5)
    chain, targets = case.chain(), case.stream().targets(judge.blocks)
    same_NTD = targets[0] + 0.1 * targets[0].abs()
    with torch.no_grad():
        *usual, same = judge.errors(chain(), case.hidden_NTD, [*targets, same_NTD])
        assert usual == case.judge(CL).errors(chain(), case.hidden_NTD, targets)
        (alone,) = case.judge().errors(chain(), case.hidden_NTD, [same_NTD])
    assert same == alone != usual[0]
    assert judge.loss([*usual, same]).item() == pytest.approx((usual[0] + 0.5 * usual[1] + 0.5 * same).item() / 2)


def test_held_out_samples_are_never_learned_from(case: Problem) -> None:
    fit = case.fit(case.chain())
    held = set(fit.held_out.tolist())
    assert held and held.isdisjoint(fit.train.tolist()) and len(held) + len(fit.train) == 32
    poisoned = case.hidden_NTD.clone()
    poisoned[fit.held_out] = float("nan")
    moved = case.fit(case.chain(), hidden=poisoned, steps=3, checks=0)
    # Only the check at the end, of the three steps, meets the poison.
    assert moved.run().halvings == 1


@pytest.mark.parametrize(
    ("steps", "grid"),
    [((), Lwc(rate=1e4)), ((Sde(band=2, rate=1e5),), Lwc()), ((Sde(band=0, rate=1e5),), Lwc(rate=1e4))],
    ids=["lwc", "sde", "both"],
)
def test_never_ends_worse(case: Problem, steps: tuple[MapStep, ...], grid: Lwc) -> None:
    fit = case.fit(case.chain(*steps, grid=grid), steps=12)
    before = case.held_out_error(fit)
    report = fit.run()
    assert report.error_after <= report.error_before
    assert case.held_out_error(fit) == pytest.approx(report.error_after, rel=1e-6)
    assert case.held_out_error(fit) <= before * (1 + 1e-6)


def test_the_last_step_is_not_what_is_kept(case: Problem) -> None:
    """Where every check is worse than the beginning, the beginning comes back exactly."""
    chain = case.chain(grid=Lwc(rate=1e4))
    start = learned(chain)
    report = case.fit(chain, steps=8).run()
    assert report.best_step == 0 and report.error_after == report.error_before
    assert same(start, learned(chain))


def test_the_mean_of_the_last_states_is_kept_where_it_is_better(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that jump about a good one are worse than their mean."""
    good = case.chain(grid=Lwc())
    case.fit(good, steps=48).run()
    middle = [group.detach().clone() for learnable in good.learnables() for group in learnable.params]
    chain, states = case.chain(grid=Lwc()), list[list[Tensor]]()

    @torch.no_grad()
    def jump(descent: Descent, number: int, share: float = 1.0) -> None:
        params = [group for learnable in chain.learnables() for group in learnable.params]
        for parameter, value in zip(params, middle, strict=True):
            parameter.copy_(value + (3.0 if number % 2 else -3.0))

    monkeypatch.setattr(Descent, "step", jump)
    fit = case.fit(chain, steps=48, tick=lambda: states.append(learned(chain)))
    report = fit.run()
    assert report.averaged and report.best_step == 48
    assert report.error_after == pytest.approx(case.held_out_error(fit), rel=1e-6)
    for mean, *values in zip(learned(chain), *states[-12:], strict=True):
        torch.testing.assert_close(mean, torch.stack(values).mean(0))
    kept = chain.state_dict()
    for key, value in zip(kept, states[-1], strict=True):
        kept[key].copy_(value)
    assert report.error_after < case.held_out_error(fit), "the last state is not as good"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_seed_same_codes(dtype: torch.dtype) -> None:
    """Nothing outside the seed has a say: not torch's global generator, nor a fresh model."""
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))
        case = problem(scheme=SCHEME, dtype=dtype)
        chain = case.chain(Sde(band=1))
        report = case.fit(chain, CL, seed=seed, steps=12).run()
        results.append((digests(chain), report))
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]


def test_every_epoch_sees_every_sample_once(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    known = {tuple(sample.sum(0).tolist()): n for n, sample in enumerate(case.hidden_NTD)}
    errors = Judge.errors

    def watch(self: Judge, weights: dict[str, Tensor], hidden: Tensor, targets: Any) -> list[Tensor]:
        if torch.is_grad_enabled():
            rows.extend(known[tuple(sample.sum(0).tolist())] for sample in hidden)
        return errors(self, weights, hidden, targets)

    monkeypatch.setattr(Judge, "errors", watch)
    fit = case.fit(case.chain(), steps=14, checks=1, batch_size=4)
    fit.run()
    assert len(known) == 32 and len(rows) == 56
    assert sorted(rows[:28]) == sorted(rows[28:]) == sorted(fit.train.tolist())
    assert rows[:28] != rows[28:]


class Poison:
    """Makes chosen losses NaN: of training steps by their number, or of checks by theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, steps: range = range(0), checks: range = range(0)) -> None:
        self.step = self.check = 0
        loss = Judge.loss

        def poisoned(judge: Judge, errors: list[Tensor]) -> Tensor:
            if torch.is_grad_enabled():
                self.step += 1
                bad = self.step in steps
            else:
                self.check += 1
                bad = self.check in checks
            return loss(judge, errors) * (math.nan if bad else 1.0)

        monkeypatch.setattr(Judge, "loss", poisoned)


class Seen(Exception):
    """Ends a run from its tick once enough has been seen."""


def test_a_loss_that_is_not_finite_restores_and_halves(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, steps=range(3, 4))
    chain = case.chain(grid=Lwc(rate=1e-2))
    states = [learned(chain)]

    def tick() -> None:
        states.append(learned(chain))
        if len(states) == 5:
            raise Seen

    with pytest.raises(Seen):
        case.fit(chain, steps=40, checks=1, tick=tick).run()
    assert not same(states[1], states[0]) and not same(states[2], states[1])
    assert same(states[3], states[0]), "step 3 failed, so the best state so far comes back"

    def moved(before: list[Tensor], after: list[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))

    # AdamW's first step moves a parameter by its rate: whole at step 1, half of the schedule's at step 4.
    schedule = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * 3 / 40))
    assert moved(states[0], states[1]) == pytest.approx(1e-2, rel=1e-3)
    assert moved(states[3], states[4]) == pytest.approx(1e-2 / 2 * schedule, rel=1e-3)


def test_learning_goes_on_after_a_bad_step(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, steps=range(2, 5))
    ticks: list[None] = []
    report = case.fit(case.chain(), steps=24, tick=lambda: ticks.append(None)).run()
    assert report.halvings == 3
    assert report.error_after < report.error_before
    assert len(ticks) == 24


def test_a_check_that_is_not_finite_counts_too(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, checks=range(2, 3))
    report = case.fit(case.chain(), steps=24).run()
    assert report.halvings == 1 and report.best_step > 6
    assert math.isfinite(report.error_after)


def test_gives_up_with_a_sentence(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, steps=range(5, 99))
    fit = case.fit(case.chain(Sde(band=1, rate=0.004), grid=Lwc(rate=0.08)), steps=24, checks=0)
    # Steps 5, 6 and 7 halve the rates; at step 8 there is nothing left to try.
    with pytest.raises(UserError, match=r"block 0: .* step 8 .* sde\.rate=0\.0005 lwc\.rate=0\.01; .*--set") as error:
        fit.run()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_diverged_gradient_is_undone(case: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite but its gradient is not: the step after shows it, and the parameters recover."""
    chain = case.chain()
    parameter = next(chain.parameters())
    calls: list[None] = []

    def once(grad: Tensor) -> Tensor:
        calls.append(None)
        return grad * math.nan if len(calls) == 2 else grad

    handle = parameter.register_hook(once)
    report = case.fit(chain, steps=24).run()
    handle.remove()
    assert report.halvings == 1
    assert all(torch.isfinite(value).all() for value in learned(chain))
    assert report.error_after < report.error_before


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples(samples: int) -> None:
    small = problem(samples=samples, tokens=6)
    report = small.fit(small.chain(), steps=4, batch_size=8, checks=2).run()
    assert report.error_after <= report.error_before


def test_nothing_to_learn(case: Problem) -> None:
    report = case.fit(case.chain(grid=Rtn()), steps=0).run()
    assert report.error_after == report.error_before > 0
