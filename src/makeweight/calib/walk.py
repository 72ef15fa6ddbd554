"""A pass through a model whose blocks are replaced by stand-ins, which see their inputs and answer in their place.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from makeweight.errors import UserError

Answer = Callable[[Tensor, dict[str, Any]], Tensor]


class StopForward(Exception):
    """Ends a forward pass once everything wanted from it has been seen."""


class _WantsTuple(Exception):
    """The model indexed a block's output, so its blocks return tuples."""


def blocks_of(model: nn.Module, blocks_path: str) -> nn.ModuleList:
    """The ModuleList of blocks at a dotted path such as "model.layers"."""
    blocks = model.get_submodule(blocks_path)
    assert isinstance(blocks, nn.ModuleList), f"{blocks_path} is a {type(blocks).__name__}"
    return blocks


class _StandIn(nn.Module):
    """Takes the place of one block: passes the call to `answer` by name, and everything else to the real block."""

    def __init__(self, block: nn.Module, answer: Answer, *, as_tuple: bool) -> None:
        super().__init__()
        # Not a submodule: the model must not see the real block's parameters twice, nor move or cast them.
        object.__setattr__(self, "_block", block)
        self._answer = answer
        self._as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        hidden_BTD, named = _bind(self.__dict__["_block"], args, kwargs)
        if hidden_BTD.ndim < 3:
            raise _WantsTuple
        answer = self._answer(hidden_BTD, named)
        return (answer,) if self._as_tuple else answer


def _bind(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Give positional arguments the names of the block's signature, and part the hidden states from the rest."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(block.forward).parameters.values() if p.kind in positional]
    assert len(args) <= len(names), f"{type(block).__name__} takes {len(names)} positional arguments, got {len(args)}"
    named = dict(zip(names, args, strict=False)) | dict(kwargs)
    return cast(Tensor, named.pop(names[0])), named


@contextmanager
def _replaced(blocks: nn.ModuleList, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    originals = list(blocks)
    try:
        for index, stand_in in enumerate(stand_ins):
            blocks[index] = stand_in
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


def walk(model: nn.Module, blocks_path: str, tokens_BT: Tensor, answers: Sequence[Answer]) -> Any:
    """Run the model with stand-ins for its blocks; its output, or None where an answer stopped the pass.

    Raises UserError for a model that does not call its blocks once each, in order.
    """
    blocks = blocks_of(model, blocks_path)
    # Current blocks return a tensor; older families return a tuple, and indexing a tensor instead costs it a dimension.
    for as_tuple in (False, True):
        taking_turns = _in_order(type(model).__name__, answers)
        stand_ins = [_StandIn(b, a, as_tuple=as_tuple) for b, a in zip(blocks, taking_turns, strict=True)]
        with _replaced(blocks, stand_ins):
            try:
                return model(input_ids=tokens_BT, use_cache=False)
            except StopForward:
                return None
            except _WantsTuple:
                continue
    raise AssertionError(f"{type(model).__name__} accepts neither a tensor nor a tuple from its blocks")


def _in_order(model: str, answers: Sequence[Answer]) -> list[Answer]:
    """Let answers raise UserError where it is not their turn: one model in use repeats its stack of blocks."""
    turns = iter(range(len(answers)))

    def checked(index: int, answer: Answer) -> Answer:
        def answer_in_turn(hidden_BTD: Tensor, named: dict[str, Any]) -> Tensor:
            if next(turns, None) != index:
                raise UserError(
                    f"{model} does not call its blocks once each, in order: block-wise work needs that, so choose "
                    "another model."
                )
            return answer(hidden_BTD, named)

        return answer_in_turn

    return [checked(index, answer) for index, answer in enumerate(answers)]
