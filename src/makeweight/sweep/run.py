"""The walk over the blocks: load, judge, learn, commit, pass on. Holds a few blocks at a time, whatever the depth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from makeweight.calib.capture import capture, place
from makeweight.calib.stream import Stream
from makeweight.methods.base import Context, GridStep, MapStep, RoundStep, State
from makeweight.models.checkpoint import Checkpoint
from makeweight.numerics.qtensor import QTensor
from makeweight.recipe import Tune
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Chain
from makeweight.sweep.fit import Fit, Judge
from makeweight.sweep.sequential import round_in_order

Tick = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """What turns the weights of a block into codes: the steps, the grid, and how learning goes."""

    maps: Sequence[MapStep]
    grid: GridStep
    judge_weights: tuple[float, ...]
    context: Context
    tune: Tune
    seed: int
    rounding: RoundStep | None = None

    def round(self, state: State) -> tuple[dict[str, Tensor], dict[str, QTensor]]:
        """Bring weights to the grid with nothing learned."""
        return Chain.build(state, self.maps, self.grid, self.context).freeze()


class Sweep:
    """Streams of hidden states and the few blocks in memory, moving through the network front to back."""

    def __init__(self, ckpt: Checkpoint, solver: Solver, tokens_NT: Tensor, device: torch.device) -> None:
        self.ckpt, self.solver, self.device = ckpt, solver, device
        self.skeleton = ckpt.skeleton()
        place(self.skeleton, device, ckpt.dtype)
        tune = solver.tune
        captured = capture(self.skeleton, ckpt.spec.blocks, tokens_NT, dtype=solver.context.dtype)
        self.kwargs = captured.kwargs
        self.stream = Stream(captured.hidden_NTD, batch_size=tune.batch_size, device=device)
        self.loaded: dict[int, Block] = {}

    def solve(self, index: int, tick: Tick | None = None) -> tuple[dict[str, QTensor], dict[str, Any]]:
        """Learn and commit a block, and pass it: its codes, and a report of plain numbers."""
        start, solver = time.perf_counter(), self.solver
        blocks = self._blocks(index)
        targets = self.stream.targets(blocks)
        chain = Chain.build(blocks[0].state(), solver.maps, solver.grid, solver.context).to(self.device)
        judge = Judge(blocks=blocks, weights=solver.judge_weights[: len(blocks)], device=self.device)
        fit = Fit(
            chain,
            judge,
            self.stream.quantized_NTD,
            targets,
            steps=solver.tune.steps,
            batch_size=solver.tune.batch_size,
            checks=solver.tune.checks,
            seed=solver.seed,
            tick=tick,
        )
        learned = asdict(fit.run())
        weights, codes, rounded = self._commit(blocks[0], chain)
        self.pass_on(index, weights)
        return codes, {**learned, **chain.report(), **rounded, "seconds": time.perf_counter() - start}

    def _commit(self, block: Block, chain: Chain) -> tuple[dict[str, Tensor], dict[str, QTensor], dict[str, float]]:
        """Return final weights, codes, and what rounding reports, where it is a step of its own."""
        solver = self.solver
        if solver.rounding is None:
            weights, codes = chain.freeze()
            return weights, codes, {}
        with torch.no_grad():
            state = chain.moved()
        return round_in_order(
            block,
            state,
            chain.quantizer,
            solver.rounding,
            solver.context,
            self.stream.quantized_NTD,
            batch_size=solver.tune.batch_size,
            device=self.device,
        )

    def pass_on(self, index: int, weights: Mapping[str, Tensor] | None) -> None:
        """Send the quantized stream through a block with its committed weights, or with its own (None)."""
        blocks = self._blocks(index)
        self.stream.targets(blocks)
        if weights is not None:
            blocks[0].write({name: weight.to(self.device) for name, weight in weights.items()})
        self.stream.step(blocks[0])
        del self.loaded[index]
        self.ckpt.unload_block(self.skeleton, index)

    def _blocks(self, index: int) -> tuple[Block, ...]:
        """Return a block and those its loss looks ahead to, loading what is not in memory yet."""
        last = min(index + len(self.solver.judge_weights), self.ckpt.n_blocks)
        for i in range(index, last):
            if i not in self.loaded:
                self.loaded[i] = Block(i, self._load(i), self.ckpt.linears(), self.kwargs[i])
        return tuple(self.loaded[i] for i in range(index, last))

    def _load(self, index: int) -> nn.Module:
        module = self.ckpt.load_block(self.skeleton, index)
        place(module, self.device, self.solver.context.dtype)
        return module.requires_grad_(False)
