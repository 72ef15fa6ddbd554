"""What enters the blocks of a model: the hidden states before block 0, and every block's keyword arguments.

Nothing here runs a block to get there: each is replaced by a stand-in, so its weights may stay on the meta device.
Shapes: N samples, B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from makeweight.errors import UserError

Answer = Callable[[Tensor, dict[str, Any]], Tensor]
PROBE = 8
"""Tokens that show what a model gives its blocks."""
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_OF_BLOCKS_DTYPE = ("position_embeddings", "attention_mask")


class _StopForward(Exception):
    """Ends a forward pass once everything wanted from it has been seen."""


class _WantsTuple(Exception):
    """The model indexed a block's output, so its blocks return tuples."""


@dataclass(frozen=True)
class Captured:
    """The inputs of block 0, [N, T, D], and what every block is called with besides them.

    `kwargs` has one entry per block (sliding windows and rotary variants differ), recorded with batch 1 so that it
    broadcasts over any batch; it holds for sequences of the same T only.
    """

    hidden_NTD: Tensor
    kwargs: tuple[dict[str, Any], ...]


@torch.no_grad()
def capture(
    model: nn.Module,
    blocks_path: str,
    tokens_NT: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 8,
) -> Captured:
    """Record the hidden states that enter block 0 and the keyword arguments of every block.

    `model` is a causal LM in evaluation mode whose blocks, a ModuleList at `blocks_path`, may lie on the meta device;
    they are put back whatever happens. Hidden states come back in `dtype` beside `tokens_NT`, arguments on the model's
    device. Raises UserError for a model that hands its blocks something that depends on the sample.
    """
    device = _device_of(model)
    kwargs = _arguments(model, blocks_path, tokens_NT[:1].to(device), dtype)
    hidden_NTD: Tensor | None = None
    done = 0

    def keep(hidden_BTD: Tensor, _: dict[str, Any]) -> Tensor:
        nonlocal hidden_NTD, done
        if hidden_NTD is None:  # one allocation: concatenating batches would hold the stream twice
            shape = (len(tokens_NT), *hidden_BTD.shape[1:])
            hidden_NTD = torch.empty(shape, dtype=dtype, device=tokens_NT.device)
        hidden_NTD[done : done + len(hidden_BTD)] = hidden_BTD
        done += len(hidden_BTD)
        raise _StopForward

    answers: list[Answer] = [keep] * len(kwargs)
    for batch_BT in tokens_NT.split(batch_size):
        _walk(model, blocks_path, batch_BT.to(device), answers)
    assert hidden_NTD is not None
    return Captured(hidden_NTD, kwargs)


def check_replay(model: nn.Module, blocks_path: str) -> None:
    """Raise the UserError that `capture` would raise for a model, on a few tokens."""
    _arguments(model, blocks_path, torch.arange(PROBE).unsqueeze(0).to(_device_of(model)), torch.float32)


def _arguments(model: nn.Module, blocks_path: str, probe_1T: Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], ...]:
    """Return the keyword arguments of every block; raises UserError where those of other samples would differ."""
    kwargs = _dry_run(model, blocks_path, probe_1T, dtype)
    # Whatever changes with the tokens (per-layer embeddings, a shared residual) cannot be replayed for other samples.
    both = _dry_run(model, blocks_path, torch.cat([probe_1T, probe_1T.flip(1)]), dtype)
    for index, (ours, others) in enumerate(zip(kwargs, both, strict=True)):
        for name, value in ours.items():
            if not _same(value, others[name]):
                raise UserError(
                    f"{type(model).__name__} gives block {index} an argument {name!r} that depends on the samples or "
                    "their number: block-wise work needs blocks that see only hidden states, so choose another model."
                )
    return kwargs


def finish(model: nn.Module, blocks_path: str, hidden_BTD: Tensor) -> Tensor:
    """Apply what a causal LM does after its last block (norm, head, soft-capping), under the caller's grad mode.

    Returns logits [B, T, V].

    The model does it itself, with stand-ins that answer `hidden_BTD` in place of its blocks; nothing there mixes
    tokens, so a stretch of a sequence may be given alone.
    """
    # Any ids do: what the model computes from them before the blocks is thrown away.
    ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.int64, device=hidden_BTD.device)
    blocks = blocks_of(model, blocks_path)
    output = _walk(model, blocks_path, ids_BT, [lambda _hidden, _named: hidden_BTD] * len(blocks))
    assert output is not None
    return output.logits


def run_block(block: nn.Module, hidden_BTD: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Call a block with recorded arguments, under the caller's grad mode: [B, T, D]."""
    return hidden_of(block(hidden_BTD, **for_batch(kwargs, len(hidden_BTD))))


def for_batch(kwargs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Return recorded arguments with the mask repeated, without a copy, for a batch: some families insist on it."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and len(mask) == 1:
        return {**kwargs, "attention_mask": mask.expand(batch, -1, -1, -1)}
    return dict(kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which is a tensor or a tuple that starts with one."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor), f"a block returned {type(output).__name__}"
    return hidden


def blocks_of(model: nn.Module, blocks_path: str) -> nn.ModuleList:
    """The ModuleList of blocks at a dotted path such as "model.layers"."""
    blocks = model.get_submodule(blocks_path)
    assert isinstance(blocks, nn.ModuleList), f"{blocks_path} is a {type(blocks).__name__}"
    return blocks


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move what is not on the meta device, and cast what the checkpoint stores; rotary tables keep their float32."""
    stored = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            narrow = id(tensor) in stored and tensor.is_floating_point()
            tensor.data = tensor.data.to(device=device, dtype=dtype if narrow else tensor.dtype)


def find_device(name: str) -> torch.device:
    """Return the device a name stands for; "auto" prefers CUDA. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type == "meta":  # which holds no numbers
        raise UserError(f"device {name!r} cannot be used here: give auto, cpu, or a device that torch finds.")
    return device


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


def _walk(model: nn.Module, blocks_path: str, tokens_BT: Tensor, answers: Sequence[Answer]) -> Any:
    """Run the model with stand-ins for its blocks; its output, or None where an answer stopped the pass."""
    blocks = blocks_of(model, blocks_path)
    # Current blocks return a tensor; older families return a tuple, and indexing a tensor instead costs it a dimension.
    for as_tuple in (False, True):
        stand_ins = [_StandIn(b, a, as_tuple=as_tuple) for b, a in zip(blocks, answers, strict=True)]
        with _replaced(blocks, stand_ins):
            try:
                return model(input_ids=tokens_BT, use_cache=False)
            except _StopForward:
                return None
            except _WantsTuple:
                continue
    raise AssertionError(f"{type(model).__name__} accepts neither a tensor nor a tuple from its blocks")


def _dry_run(model: nn.Module, blocks_path: str, probe_1T: Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], ...]:
    """The keyword arguments of every block for one sample."""
    count = len(blocks_of(model, blocks_path))
    seen: dict[int, dict[str, Any]] = {}
    cleaned: dict[int, tuple[Tensor, Tensor]] = {}  # blocks share masks and tables: clean each tensor once

    def recorder(index: int) -> Answer:
        def answer(hidden_BTD: Tensor, named: dict[str, Any]) -> Tensor:
            seen[index] = {name: _clean(name, value, dtype, cleaned) for name, value in named.items()}
            if index == count - 1:
                raise _StopForward
            return hidden_BTD

        return answer

    _walk(model, blocks_path, probe_1T, [recorder(index) for index in range(count)])
    return tuple(seen[index] for index in range(count))


def _clean(name: str, value: Any, dtype: torch.dtype, cleaned: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Detach tensors, cast rotary tables and masks to the blocks' dtype, drop caches, which every pass would change."""
    if name in _CACHES:
        return None
    if name == "use_cache":
        return False
    if isinstance(value, Tensor):
        if id(value) not in cleaned:
            cast = name in _OF_BLOCKS_DTYPE and value.is_floating_point()
            # The original is kept beside the copy so that its id cannot be reused during the pass.
            cleaned[id(value)] = (value, _cast(value.detach(), dtype) if cast else value.detach())
        return cleaned[id(value)][1]
    if type(value) in (tuple, list):
        return type(value)(_clean(name, item, dtype, cleaned) for item in value)
    if type(value) is dict:
        return {key: _clean(name, item, dtype, cleaned) for key, item in value.items()}
    return value


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor; what hides a token stays the least number, of either dtype, and does not become infinite."""
    wide = torch.promote_types(tensor.dtype, torch.promote_types(dtype, torch.float32))
    return tensor.to(wide).clamp(min=torch.finfo(dtype).min).to(dtype)


def _same(ours: Any, others: Any) -> bool:
    """Whether an argument recorded for one sample serves for others; what is not a tensor does not count."""
    if isinstance(ours, Tensor):
        if not isinstance(others, Tensor) or ours.ndim != others.ndim:
            return False
        fits = all(one in (1, two) for one, two in zip(ours.shape, others.shape, strict=True))
        if not fits or not others.is_floating_point() or not others.numel():
            return fits and torch.equal(ours.expand_as(others), others)
        # Two passes may differ in the last bit of a cosine, and did.
        size = float(others.float().abs().nan_to_num(posinf=0).max())
        return torch.allclose(ours.float().expand_as(others), others.float(), rtol=1e-2, atol=1e-2 * size)
    if isinstance(ours, (tuple, list)):
        return len(ours) == len(others) and all(map(_same, ours, others))
    if isinstance(ours, dict):
        return ours.keys() == others.keys() and all(_same(ours[key], others[key]) for key in ours)
    return True


def _device_of(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if p.device.type != "meta")
