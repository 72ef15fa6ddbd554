"""Each group moves by its own rule and along its own schedule."""

from __future__ import annotations

import math

import pytest
import torch

from makeweight.methods.base import Context, Learnables
from makeweight.methods.grid.rounding import REACH, Rounding
from makeweight.methods.weight.sde import Sde
from makeweight.numerics.scheme import Scheme
from makeweight.sweep.chain import Chain, Steps
from makeweight.sweep.descent import FINAL_RATE, Descent

STEPS = 8


def a_chain(steps: int = STEPS) -> Chain:
    state = {"w": torch.randn(16, 32, generator=torch.Generator().manual_seed(0))}
    context = Context(
        scheme=Scheme(bits=3, group_size=16), scale_dtype=torch.bfloat16, dtype=torch.float32, steps=steps
    )
    return Chain.build(state, Steps(maps=[Sde(band=1)], grid=Rounding()), context)


def test_signs_fall_in_a_straight_line_and_adam_along_a_cosine() -> None:
    chain = a_chain()
    descent = Descent(chain.learnables(), STEPS)
    (band, *_), (offset, *_) = (group.params for group in chain.learnables())
    unit = next(group.rate * group.unit for group in chain.learnables())
    for number in range(1, STEPS + 1):
        before = band.detach().clone(), offset.detach().clone()
        descent.zero_grad()
        band.grad, offset.grad = torch.ones_like(band), torch.full_like(offset, -3.0)
        descent.step(number)
        fall = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * (number - 1) / STEPS))
        assert float((before[0] - band.detach()).max()) == pytest.approx(unit * fall, rel=1e-3)
        assert float((offset.detach() - before[1]).max()) == pytest.approx((1 - (number - 1) / STEPS) / STEPS, rel=1e-4)
    assert float(offset.detach().max()) == pytest.approx(REACH * (1 + 1 / STEPS), rel=1e-4)
    with torch.no_grad():
        chain.constrain()
    assert float(offset.detach().max()) == REACH


def test_a_share_of_the_rate_and_what_has_no_gradient() -> None:
    chain = a_chain()
    descent = Descent(chain.learnables(), STEPS)
    _, (offset, low, *_) = (group.params for group in chain.learnables())
    before = low.detach().clone()
    offset.grad = torch.ones_like(offset)
    descent.step(1, 0.25)
    assert float(offset.detach().max()) == pytest.approx(-0.25 / STEPS)
    assert torch.equal(low, before)
    descent.zero_grad()
    assert offset.grad is None


@pytest.mark.parametrize(("betas", "forgets"), [((0.0, 0.0), True), ((0.9, 0.999), False)])
def test_each_group_forgets_as_fast_as_it_says(betas: tuple[float, float], forgets: bool) -> None:
    """What remembers nothing goes a whole step back where the slope turns round; AdamW's usual way hardly moves."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    descent = Descent([Learnables("any", (parameter,), rate=0.1, betas=betas)], STEPS)
    parameter.grad = torch.ones(4)
    descent.step(1)
    assert float(parameter.detach()[0]) == pytest.approx(-0.1, rel=1e-4)
    parameter.grad = -torch.ones(4)
    descent.step(2)
    fall = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi / STEPS))
    assert (float(parameter.detach()[0]) == pytest.approx(-0.1 + 0.1 * fall, abs=1e-6)) == forgets
