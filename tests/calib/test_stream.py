"""Targets are what the original network gives, each block is run once, and nothing more is kept than promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from makeweight.calib.stream import Stream, advance
from tests.sweep.problem import CPU, Problem, problem


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem(samples=6, layers=4)


class Counted:
    """A layer that counts the samples that pass through it, and the most that came at once."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self.layer = layer
        self.samples = self.largest = 0

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        self.samples += len(hidden_BTD)
        self.largest = max(self.largest, len(hidden_BTD))
        return self.layer(hidden_BTD)


def window(layers: list[Counted], index: int, ahead: int) -> tuple[Counted, ...]:
    return tuple(layers[index : index + ahead + 1])


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_targets_equal_running_the_blocks_in_turn(case: Problem, ahead: int, batch_size: int) -> None:
    expected, hidden = [], case.hidden_NTD
    for block in case.blocks:
        hidden = torch.cat([block(part) for part in hidden.split(batch_size)])
        expected.append(hidden)
    layers = [Counted(block) for block in case.blocks]
    stream = case.stream(batch_size)
    for index in range(len(layers)):
        targets = stream.targets(window(layers, index, ahead))
        assert len(targets) == min(ahead + 1, len(layers) - index)
        for target, want in zip(targets, expected[index:], strict=False):
            assert torch.equal(target, want)
        stream.step(lambda hidden: hidden * 0.5)
    assert [layer.samples for layer in layers] == [6] * 4
    assert all(layer.largest <= batch_size for layer in layers)


def test_asking_again_runs_nothing(case: Problem) -> None:
    layers = [Counted(block) for block in case.blocks]
    stream = case.stream()
    first = stream.targets(window(layers, 0, 1))
    again = stream.targets(window(layers, 0, 1))
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert [layer.samples for layer in layers] == [6, 6, 0, 0]


def test_the_quantized_stream_meets_committed_blocks_only(case: Problem) -> None:
    """Quantization never reaches the targets, and the original never the quantized stream."""
    stream, plain = case.stream(), case.stream()
    hidden = case.hidden_NTD
    assert torch.equal(stream.quantized_NTD, hidden)
    for index, block in enumerate(case.blocks):
        targets = stream.targets(case.blocks[index : index + 2])
        for ours, theirs in zip(targets, plain.targets(case.blocks[index : index + 2]), strict=True):
            assert torch.equal(ours, theirs)
        rough = {name: weight.round() for name, weight in block.state().items()}
        stream.step(lambda x, block=block, rough=rough: block(x, rough))
        plain.step(block)
        hidden = torch.cat([block(part, rough) for part in hidden.split(4)])
        assert torch.equal(stream.quantized_NTD, hidden)
        assert torch.equal(plain.quantized_NTD, targets[0]), "committed unchanged, the two streams agree"
        assert not torch.equal(stream.quantized_NTD, targets[0])


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_memory_does_not_grow_with_depth(ahead: int) -> None:
    """The quantized stream and the targets of the window, at any depth and on the way through a block."""
    stream, places = Stream(torch.randn(3, 4, 8), batch_size=2, device=CPU), set[int]()
    layers: list[Callable[[Tensor], Tensor]] = [torch.tanh] * 12
    for index in range(12):
        targets = stream.targets(tuple(layers[index : index + ahead + 1]))
        stream.step(torch.tanh)
        places |= {tensor.data_ptr() for tensor in (*targets, stream.quantized_NTD)}
    assert len(places) == 2 + ahead


def test_advance_keeps_dtype_and_builds_no_graph() -> None:
    hidden = torch.randn(5, 3, 8).bfloat16()
    scale = torch.ones(8, requires_grad=True)
    output = advance(lambda x: x.float() * scale * 2, hidden, batch_size=2, device=CPU)
    assert output.dtype == torch.bfloat16 and not output.requires_grad
    assert torch.equal(output, hidden * 2)
