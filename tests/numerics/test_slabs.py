"""Working on a few rows at a time changes no bit of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from makeweight.numerics import slabs
from makeweight.numerics.flips import Flips
from makeweight.numerics.grid import clipped_grid, grouped
from makeweight.numerics.scheme import Scheme
from makeweight.numerics.search import best_factors, power_error
from makeweight.numerics.slabs import by_rows
from makeweight.numerics.stepgrid import moving_grid, stepped_grid

ROWS, COLUMNS = 37, 96  # slabs of 5 rows: the last one is smaller
DTYPES = {"scale_dtype": torch.bfloat16, "dtype": torch.bfloat16}


@pytest.fixture
def five_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes all later slabs five rows large, whatever the machine's threads."""

    def shrink() -> None:
        monkeypatch.setattr(slabs, "SLAB", 5 * COLUMNS)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    return shrink


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clipped(group: int, *, offset: bool, flips: bool) -> Sequence[Tensor]:
    weight, low, high = draw(0, ROWS, COLUMNS), draw(1, ROWS, COLUMNS // group), draw(2, ROWS, COLUMNS // group)
    leaves = [leaf.requires_grad_() for leaf in (weight, low.sigmoid(), high.sigmoid(), draw(3, ROWS, COLUMNS) / 4)]
    out = clipped_grid(
        leaves[0],
        leaves[1],
        leaves[2],
        Scheme(bits=3, group_size=group),
        offset_OI=leaves[3] if offset else None,
        flips=Flips((draw(4, ROWS, 1).abs(), draw(5, COLUMNS).abs()), own=0.7, damp=0.1) if flips else None,
        **DTYPES,
    )
    return [out, *torch.autograd.grad(out, leaves[: 3 + offset], draw(6, ROWS, COLUMNS).bfloat16())]


def stepped(group: int) -> Sequence[Tensor]:
    leaves = [draw(0, ROWS, COLUMNS), draw(1, ROWS, COLUMNS // group).abs(), draw(2, ROWS, COLUMNS // group)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = stepped_grid(leaves[0], leaves[1], leaves[2], Scheme(bits=3, group_size=group), **DTYPES)
    return [out, *torch.autograd.grad(out, leaves, draw(6, ROWS, COLUMNS).bfloat16())]


def moved(group: int) -> Sequence[Tensor]:
    codes = draw(0, ROWS, COLUMNS).round().clamp(-4, 3).to(torch.int8)
    offset, scale = draw(1, ROWS, COLUMNS).requires_grad_(), draw(2, ROWS, COLUMNS // group).requires_grad_()
    zero = draw(3, ROWS, COLUMNS // group).round()
    out = moving_grid(codes, offset, scale, zero, Scheme(bits=3, group_size=group), torch.bfloat16)
    return [out, *torch.autograd.grad(out, [offset, scale], draw(6, ROWS, COLUMNS).bfloat16())]


def searched(group: int) -> Sequence[Tensor]:
    def error(delta_OGS: Tensor) -> Tensor:
        return power_error(delta_OGS, 2.0)

    weight_OGS, shares = grouped(draw(0, ROWS, COLUMNS), group), (1.0, 0.8, 0.6)
    return [best_factors(weight_OGS, Scheme(bits=3), torch.bfloat16, shares=shares, error=error)]


@pytest.mark.parametrize("group", [32, COLUMNS])
@pytest.mark.parametrize(
    "work",
    [
        lambda group: clipped(group, offset=False, flips=False),
        lambda group: clipped(group, offset=True, flips=False),
        lambda group: clipped(group, offset=True, flips=True),
        stepped,
        moved,
        searched,
    ],
    ids=["clipped", "offset", "flips", "stepped", "moved", "searched"],
)
def test_grids_are_the_same_in_slabs(
    work: Callable[[int], Sequence[Tensor]], group: int, five_rows: Callable[[], None]
) -> None:
    whole = work(group)
    five_rows()
    for one, other in zip(whole, work(group), strict=True):
        assert torch.equal(one, other)


def test_every_row_is_worked_on_once_and_none_stays_none(five_rows: Callable[[], None]) -> None:
    seen: list[int] = []

    def work(left: Tensor, right: None, column: Tensor) -> tuple[Tensor | None, ...]:
        assert right is None
        seen.append(len(left))
        return left * column, None, column.half()

    five_rows()
    left, column = draw(0, ROWS, COLUMNS), draw(1, ROWS, 1)
    product, nothing, half = by_rows(work, left, None, column)
    assert seen == [5] * 7 + [2]
    assert product is not None and torch.equal(product, left * column)
    assert nothing is None
    assert half is not None and half.dtype == torch.float16
