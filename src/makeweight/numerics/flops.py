"""How many operations a step takes, and how many this machine does per second.

A multiply-add counts as two operations. P weights of a block, T tokens, D hidden.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import torch

from makeweight.numerics.grid import clipped_grid
from makeweight.numerics.scheme import Scheme

CROWDED = 1.25
"""Processes at work for each processor beyond which a measured rate says little of this machine alone."""


def block_flops(shapes: Iterable[tuple[int, int]], hidden: int, batch: int, seqlen: int) -> float:
    """Operations of a block's forward and backward: 6 P T for its linears, 12 D T^2 per sequence for attention."""
    weights = sum(rows * columns for rows, columns in shapes)
    return 6.0 * weights * batch * seqlen + 12.0 * hidden * seqlen**2 * batch


def band_flops(shapes: Iterable[tuple[int, int]], band: int) -> float:
    """Operations of SDE, once per step.

    Per linear, with r = min(m, n): 4 m r n for U B V^T and its gradient, 4 r^2 (2 b + 1) for the band's own products.
    """
    total = 0.0
    for rows, columns in shapes:
        rank = min(rows, columns)
        total += 4.0 * rows * columns * rank + 4.0 * rank**2 * min(2 * band + 1, rank)
    return total


def step_flops(
    shapes: Iterable[tuple[int, int]], hidden: int, batch: int, seqlen: int, *, ahead: int = 0, band: int | None = None
) -> float:
    """Operations of one optimiser step; a frozen block ahead costs forward and input gradient, 4/6 of a trained one.

    `band` is SDE's, None without it.
    """
    shapes = list(shapes)
    return block_flops(shapes, hidden, batch, seqlen) * (1 + ahead * 4 / 6) + (
        0.0 if band is None else band_flops(shapes, band)
    )


def matmul_rate(
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype,
    rows: int = 2048,
    size: int = 1024,
    seconds: float = 0.3,
) -> float:
    """Measure the matrix-product rate in operations per second: (rows, size) times (size, size), best of several."""
    left = torch.randn(rows, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2.0 * rows * size * size / _best(lambda: torch.mm(left, right), 4, seconds, left.device)


def step_rate(
    shape: tuple[int, int],
    tokens: int,
    group: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seconds: float = 0.3,
) -> float:
    """Measure operations per second of one linear that learns: weight to grid, forward, backward, a step of AdamW.

    What is done to a weight once a step weighs more the fewer tokens there are and the faster the machine multiplies
    matrices, so that the rate of plain products says little of it. Sizes are cut to what takes a moment.
    """
    rows, columns, tokens = min(shape[0], 2048), min(shape[1], 2048), min(tokens, 4096)
    group = columns if group == -1 else min(group, columns)
    columns -= columns % group
    weight_OI = torch.nn.Parameter(torch.randn(rows, columns, device=device))
    factor_OG = torch.ones(rows, columns // group, device=device)
    hidden_TI = torch.randn(tokens, columns, device=device).to(dtype).requires_grad_()
    scheme, descent = Scheme(bits=4), torch.optim.AdamW([weight_OI], fused=True)

    def step() -> None:
        held_OI = clipped_grid(weight_OI, factor_OG, factor_OG, scheme, scale_dtype=torch.float16, dtype=dtype)
        (hidden_TI @ held_OI.T).backward(hidden_TI.detach().new_ones(tokens, rows))
        descent.step()
        descent.zero_grad()

    # On a busy machine a step that waits for its threads takes many times as long as the next one.
    return 6.0 * rows * columns * tokens / _best(step, 1, seconds, torch.device(device), least=10)


def elementwise_rate(device: torch.device | str = "cpu", *, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure elements per second of a gated activation, forward and backward: what a block does besides products."""
    gate, up = (torch.randn(1024, 1536, device=device).to(dtype).requires_grad_() for _ in range(2))
    slope = torch.ones_like(gate)

    def step() -> None:
        torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), slope)

    return gate.numel() / _best(step, 1, seconds, torch.device(device), least=10)


def crowded() -> bool:
    """Say whether other processes kept the processors busy in the last minute; False where the system does not tell."""
    try:
        return os.getloadavg()[0] > CROWDED * (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows has no such number
        return False


def _best(work: Callable[[], object], times: int, seconds: float, device: torch.device, *, least: int = 1) -> float:
    """Return the seconds that some work takes, the least of several tries of so many `times` each."""
    for _ in range(3):
        work()
    best, tries, end = float("inf"), 0, time.perf_counter() + seconds
    while tries < least or time.perf_counter() < end:
        tries += 1
        _wait(device)
        start = time.perf_counter()
        for _ in range(times):
            work()
        _wait(device)
        best = min(best, (time.perf_counter() - start) / times)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
