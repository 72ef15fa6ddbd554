"""Proves a spec on a real model: every edge is rescaled at random and the logits must not move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from makeweight.models.rescale import State, channels, qk_free, rescale, rescale_qk
from makeweight.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-9


class SpecError(AssertionError):
    """A spec says something about a model that is not so."""


class _AllDouble(TorchFunctionMode):
    """Computes in float64 where a model's code asks for float32, as norms and softmax do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if item is torch.float32 else item for item in args)
        kwargs = {key: torch.float64 if item is torch.float32 else item for key, item in (kwargs or {}).items()}
        return func(*args, **kwargs)


def validate(spec: ModelSpec, model: PreTrainedModel, *, seed: int = 0) -> None:
    """Prove on `model` (small, with random weights) that the spec's edges are exact and that it forgets no linear.

    Each edge of each block is rescaled by random positive factors; the logits [1, 12, V] must agree with the original's
    to 1e-9 relative in float64. Raises `SpecError` naming the edge, or the linear that no edge reads.
    """
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    blocks = _check_paths(spec, model)
    tokens = torch.randint(0, model.config.vocab_size, (1, 12), generator=generator)
    reference = _logits(model, tokens)
    config = model.config

    def prove(label: str, change: Callable[[State], State]) -> None:
        for block in blocks:
            before = dict(block.state_dict())
            block.load_state_dict({**before, **change(before)}, assign=True)
            error = _relative(_logits(model, tokens), reference)
            block.load_state_dict(before, assign=True)
            if not error <= TOLERANCE:
                raise SpecError(f"{spec.family}: {label} changes the model's logits by {error:.1e} of their size.")

    def positive(*shape: int) -> Tensor:
        return torch.exp(torch.randn(*shape, generator=generator, dtype=torch.float64) / 2)

    for edge in spec.edges:
        prove(
            f"the edge {edge.src} -> {', '.join(edge.dst)}",
            lambda state, edge=edge: rescale(state, spec, config, edge, positive(channels(state, spec, config, edge))),
        )
    if spec.qk is not None:
        scale_KF = positive(*qk_free(spec, config))
        prove(f"the pair {' , '.join(spec.qk)}", lambda state: rescale_qk(state, spec, config, scale_KF))


def _check_paths(spec: ModelSpec, model: PreTrainedModel) -> nn.ModuleList:
    names = {name for name, _ in model.named_modules()}
    for path in (spec.blocks, spec.embedding, spec.final_norm, spec.head):
        if path is not None and path not in names:
            raise SpecError(f"{spec.family}: the model has no module {path}.")
    blocks = model.get_submodule(spec.blocks)
    assert isinstance(blocks, nn.ModuleList)
    inside = dict(blocks[0].named_modules())
    linears = {name for name, module in inside.items() if isinstance(module, nn.Linear)}
    listed = {name for edge in spec.edges for name in edge.dst} | set(spec.residual_writers)
    listed |= set(spec.norms) | set(spec.output_norms)
    absent = sorted(listed - set(inside))
    if absent:
        raise SpecError(f"{spec.family}: a block has no module {absent[0]}.")
    named = (
        listed | {part for pair in (spec.heads, spec.qk) for part in (pair or ())} | {edge.src for edge in spec.edges}
    )
    forgotten = sorted(linears - named)
    if forgotten and spec.edges:
        raise SpecError(f"{spec.family}: no edge mentions the linear {forgotten[0]}.")
    return blocks


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad(), _AllDouble():
        return model(tokens, use_cache=False).logits


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
