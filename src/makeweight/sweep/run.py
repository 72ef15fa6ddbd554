"""The walk over the blocks: load, judge, learn, commit, pass on. Holds a few blocks at a time, whatever the depth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from makeweight.calib.capture import capture, place
from makeweight.calib.stream import Stream, advance
from makeweight.methods.base import Context, Params, RoundStep, State
from makeweight.models.attention import speed_up
from makeweight.models.checkpoint import Checkpoint
from makeweight.numerics.memory import release_freed_memory
from makeweight.numerics.qtensor import QTensor
from makeweight.recipe import Tune
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Chain, Frozen, Steps, split
from makeweight.sweep.fit import Fit
from makeweight.sweep.inputs import Moments
from makeweight.sweep.judge import Judge
from makeweight.sweep.sequential import round_in_order

Tick = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """What turns the weights of a block into codes: the steps, and how learning goes."""

    steps: Steps
    judge_weights: tuple[float, ...]
    context: Context
    tune: Tune
    seed: int
    pieces: int = 1
    """Into how many a sample is cut: held out are whole ones."""
    same_input: float = 0.0
    """Weight of the error against what the original block makes of the quantized input; at 0 it is not computed."""
    rounding: RoundStep | None = None

    def round(self, state: State) -> dict[str, QTensor]:
        """Bring weights to the grid with nothing learned."""
        return Chain.build(state, self.steps, self.context).freeze().codes


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What a block has become: codes by linear, other parameters that changed as they are stored, and a report."""

    codes: dict[str, QTensor]
    rest: Params
    report: dict[str, Any]


class Sweep:
    """Streams of hidden states and the few blocks in memory, moving through the network front to back."""

    def __init__(self, ckpt: Checkpoint, solver: Solver, tokens_NT: Tensor, device: torch.device) -> None:
        self.ckpt, self.solver, self.device = ckpt, solver, device
        self.skeleton = speed_up(ckpt.skeleton())
        place(self.skeleton, device, ckpt.dtype)
        tune = solver.tune
        captured = capture(self.skeleton, ckpt.spec.blocks, tokens_NT, dtype=solver.context.dtype)
        self.kwargs = captured.kwargs
        place(self.skeleton, torch.device("cpu"), ckpt.dtype)  # a GPU's memory is for blocks
        self.stream = Stream(captured.hidden_NTD, batch_size=tune.batch_size, device=device)
        self.loaded: dict[int, Block] = {}

    def solve(self, index: int, tick: Tick | None = None) -> Committed:
        """Learn and commit a block, and pass it."""
        start, solver = time.perf_counter(), self.solver
        blocks = self._blocks(index)
        targets = self.stream.targets(blocks)
        state, own = self._stored(blocks[0])
        chain = self._chain(blocks[0], state, own)
        if solver.same_input:
            batch_size = solver.tune.batch_size
            quantized_NTD = self.stream.quantized_NTD
            targets += (advance(blocks[0], quantized_NTD, batch_size=batch_size, device=self.device),)
        judge = Judge(
            blocks=blocks,
            weights=solver.judge_weights[: len(blocks)],
            same_input=solver.same_input,
            device=self.device,
        )
        fit = Fit(
            chain,
            judge,
            self.stream.quantized_NTD,
            targets,
            steps=solver.tune.steps,
            batch_size=solver.tune.batch_size,
            checks=solver.tune.checks,
            seed=solver.seed,
            pieces=solver.pieces,
            tick=tick,
        )
        fitted = fit.run()
        frozen, errors = self._freeze(blocks[0], chain, fit, fitted.error_after)
        rest = {
            name: tensor.to(self.ckpt.dtype)
            for name, tensor in frozen.rest.items()
            if not torch.equal(tensor, own[name])
        }
        self.pass_on(index, {**frozen.weights, **rest})
        report = {**asdict(fitted), **errors, **chain.report(), **frozen.report}
        report["seconds"] = time.perf_counter() - start
        return Committed(codes=frozen.codes, rest=rest, report=report)

    def _stored(self, block: Block) -> tuple[State, Params]:
        """Return a block's weights to quantize and its other parameters, fp32, as the file has them.

        The block itself holds them in the forward's dtype, which may be narrower.
        """
        read = self.ckpt.block_state(block.index, torch.float32)
        params = {name: read[name].to(self.device) for name, _ in block.module.named_parameters()}
        return split(params, block.linears)

    def _chain(self, block: Block, state: State, own: Params) -> Chain:
        """Build the maps of a block, with what its linears read where a step asks."""
        solver = self.solver

        def inputs(params: Params) -> Moments:
            weights = {name: tensor.to(solver.context.dtype) for name, tensor in params.items()}
            return Moments(block, weights, self.stream.quantized_NTD, solver.tune.batch_size, self.device)

        rest = own if solver.steps.exact else {}
        chain = Chain.build(state, solver.steps, solver.context, rest=rest, stored=self.ckpt.dtype, inputs=inputs)
        return chain.to(self.device)

    def _freeze(self, block: Block, chain: Chain, fit: Fit, nearest: float) -> tuple[Frozen, dict[str, float]]:
        """Return what was learned, rounded by the step that rounds, where it is one of its own, and its errors.

        What is learned is learned for the nearest codes, whose held-out error is `nearest`; where something was
        learned and these are better than the step's own, they stay.
        """
        solver = self.solver
        if solver.rounding is None:
            return chain.freeze(), {}
        with torch.no_grad():
            moved = chain.moved()
        frozen = round_in_order(
            block,
            *moved,
            chain.quantizer,
            solver.rounding,
            solver.context,
            self.stream.quantized_NTD,
            batch_size=solver.tune.batch_size,
            device=self.device,
        )
        changed = {name: tensor.to(solver.context.dtype) for name, tensor in frozen.rest.items()}
        rounded = fit.error({**frozen.weights, **changed})
        errors = {"error_nearest": nearest, "error_rounded": rounded}
        if fit.learns and nearest < rounded:
            return chain.freeze(), {**errors, "error_after": nearest}
        return frozen, {**errors, "error_after": rounded}

    def pass_on(self, index: int, weights: Mapping[str, Tensor] | None) -> None:
        """Send the quantized stream through a block with its committed weights, or with its own (None)."""
        blocks = self._blocks(index)
        self.stream.targets(blocks)
        if weights is not None:
            dtype = self.solver.context.dtype
            blocks[0].write({name: tensor.to(self.device, dtype) for name, tensor in weights.items()})
        self.stream.step(blocks[0])
        del self.loaded[index]
        self.ckpt.unload_block(self.skeleton, index)
        release_freed_memory()  # else the heap grows by a little with every block

    def _blocks(self, index: int) -> tuple[Block, ...]:
        """Return a block and those its loss looks ahead to, loading what is not in memory yet."""
        last = min(index + len(self.solver.judge_weights), self.ckpt.n_blocks)
        for i in range(index, last):
            if i not in self.loaded:
                bits = self.solver.context.scheme.activations
                self.loaded[i] = Block(i, self._load(i), self.ckpt.linears(), self.kwargs[i], bits)
        return tuple(self.loaded[i] for i in range(index, last))

    def _load(self, index: int) -> nn.Module:
        module = self.ckpt.load_block(self.skeleton, index)
        place(module, self.device, self.solver.context.dtype)
        return module.requires_grad_(False)
