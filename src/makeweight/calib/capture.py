"""What enters the blocks of a model: the hidden states before block 0, and every block's keyword arguments.

Nothing here runs a block to get there, so its weights may stay on the meta device.
Shapes: N samples, B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from makeweight.calib.walk import Answer, StopForward, blocks_of, walk
from makeweight.errors import UserError

PROBE = 8
"""Tokens that show what a model gives its blocks."""
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_OF_BLOCKS_DTYPE = ("position_embeddings", "attention_mask")


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
        raise StopForward

    answers: list[Answer] = [keep] * len(kwargs)
    for batch_BT in tokens_NT.split(batch_size):
        walk(model, blocks_path, batch_BT.to(device), answers)
    assert hidden_NTD is not None
    return Captured(hidden_NTD, kwargs)


@torch.no_grad()
def check_replay(model: nn.Module, blocks_path: str) -> None:
    """Raise UserError, after passes of a few tokens, for a model that cannot be worked on block by block.

    Such are those that `capture` refuses, that do not call their blocks once each, or that change what a block
    returns before the next.
    """
    probe_1T = torch.arange(PROBE).unsqueeze(0).to(_device_of(model))
    kwargs = _arguments(model, blocks_path, probe_1T, torch.float32)
    returned: list[Tensor] = []

    def answer(hidden_BTD: Tensor, _: dict[str, Any]) -> Tensor:
        if returned and not torch.equal(hidden_BTD, returned[-1]):
            raise UserError(
                f"{type(model).__name__} changes the hidden states between its blocks: block-wise work needs each "
                "block to get what the one before it returned, so choose another model."
            )
        returned.append(hidden_BTD + 1)
        return returned[-1]

    def first(hidden_BTD: Tensor, named: dict[str, Any]) -> Tensor:
        returned.clear()
        return answer(hidden_BTD, named)

    walk(model, blocks_path, probe_1T, [first, *[answer] * (len(kwargs) - 1)])


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
    output = walk(model, blocks_path, ids_BT, [lambda _hidden, _named: hidden_BTD] * len(blocks))
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


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move what is not on the meta device, and cast what the checkpoint stores; rotary tables keep their float32."""
    stored = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            narrow = id(tensor) in stored and tensor.is_floating_point()
            tensor.data = tensor.data.to(device=device, dtype=dtype if narrow else tensor.dtype)


def find_device(name: str) -> torch.device:
    """Return the device a name stands for; "auto" prefers CUDA. Raises UserError for one that does not compute."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        one = torch.ones(1, device=wanted)
        if one.add(1).item() == 2:  # GPUs that this torch was not built for are there, and fail at this
            return one.device
    except (RuntimeError, AssertionError):
        pass
    if name == "auto":
        raise UserError(f"device {wanted!r} is there and fails: give cpu, or install a torch that was built for it.")
    raise UserError(f"device {name!r} cannot be used here: no such device works with this torch; give auto or cpu.")


def _dry_run(model: nn.Module, blocks_path: str, probe_1T: Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], ...]:
    """The keyword arguments of every block for one sample."""
    count = len(blocks_of(model, blocks_path))
    seen: dict[int, dict[str, Any]] = {}
    cleaned: dict[int, tuple[Tensor, Tensor]] = {}  # blocks share masks and tables: clean each tensor once

    def recorder(index: int) -> Answer:
        def answer(hidden_BTD: Tensor, named: dict[str, Any]) -> Tensor:
            seen[index] = {name: _clean(name, value, dtype, cleaned) for name, value in named.items()}
            if index == count - 1:
                raise StopForward
            return hidden_BTD

        return answer

    walk(model, blocks_path, probe_1T, [recorder(index) for index in range(count)])
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
