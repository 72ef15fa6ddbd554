"""A checkpoint on disk of which one block at a time is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from makeweight.errors import UserError, first_line
from makeweight.models import packed
from makeweight.models.registry import empty_model, spec_for
from makeweight.models.shards import PICKLES, Shards
from makeweight.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = (
    *PICKLES,
    "*.safetensors",
    "*.index.json",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "config.json",
    ".*",
)
TEMPLATES = "additional_chat_templates/*.jinja"
"""Where transformers keeps the chat templates of a tokenizer that are not its default."""


class Checkpoint:
    """An HF folder of safetensors, read lazily.

    `path` is the folder, `dtype` the floating dtype most weights are stored in, `spec` the family, `activations` the
    bits to which a runtime rounds what enters a quantized linear (16: not at all). A folder in
    one of compressed-tensors' integer formats looks like an ordinary one: its linears are decoded as they are read.
    Raises `UserError` where a tensor of the model is missing or has another shape.
    """

    def __init__(
        self,
        path: Path,
        config: PretrainedConfig,
        *,
        name: str,
        bits: tuple[int, ...] = (),
        activations: int = 16,
        trust_remote_code: bool = False,
    ) -> None:
        self.path, self.name, self.config = path, name, config
        self.activations = activations
        self._bits, self._trust = bits, trust_remote_code
        self._shards = Shards(path)
        self.dtype = self._stored_dtype()
        self.config.dtype = self.dtype
        self._layout = empty_model(config, trust_remote_code=trust_remote_code)
        self._tied: dict[str, str] = getattr(self._layout, "all_tied_weights_keys", None) or {}
        self.spec: ModelSpec = spec_for(config, self._layout)
        self.n_blocks: int = len(self.blocks(self._layout))
        if not self.n_blocks:
            raise UserError(f"{path}/config.json describes a model without blocks: use the one of the weights.")
        self._check_names()

    def _stored_dtype(self) -> torch.dtype:
        most = self._shards.float_dtype(self.config.dtype)
        if most is None:
            raise UserError(f"{self.path} holds no floating-point weights: give an unquantized model.")
        return torch.float32 if most == torch.float64 else most

    @cached_property
    def _packed(self) -> frozenset[str]:
        return frozenset(packed.linears(self._shards.entries))

    @cached_property
    def _names(self) -> dict[str, tuple[int, ...]]:
        """Stored tensors with packed linears counted as one weight: name and shape."""
        names: dict[str, tuple[int, ...]] = {}
        for stored, entry in self._shards.entries.items():
            linear, _, part = stored.rpartition(".")
            if linear not in self._packed or part not in packed.PARTS or part == "weight":
                names[stored] = entry.shape
            elif part == "weight_shape":
                height, width = self._shards.read(stored).tolist()
                names[f"{linear}.weight"] = (height, width)
        return names

    @cached_property
    def _stored(self) -> dict[str, str]:
        """The model's name of each stored tensor, mapped to its name in the file."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        # Several families' modules were renamed after their checkpoints were published (GPT-NeoX's embed_out).
        mapping = get_model_conversion_mapping(self._layout)
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        own = set(self._layout.state_dict(keep_vars=True))
        prefix = f"{self._layout.base_model_prefix}."
        stored: dict[str, str] = {}
        for name in self._names:
            renamed = rename_source_key(name, renamings, [])[0]
            known = [item for item in (renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix)) if item in own]
            inside = f"{prefix}{renamed}".startswith(f"{self.spec.blocks}.")
            stored[known[0] if known else f"{prefix}{renamed}" if inside else renamed] = name
        # Of tied tensors a file may hold either: what safetensors keeps is the first by name, a head.
        for name, partner in self._tied.items():
            if partner not in stored and name in stored:
                stored[partner] = stored.pop(name)
        return stored

    @property
    def bits(self) -> int:
        """Bits of a weight of the blocks as the file has it."""
        return max(self._bits) if self._packed else 8 * self.dtype.itemsize

    def stored_name(self, name: str) -> str | None:
        """Return the name under which the file holds a tensor of the model, if it does."""
        return self._stored.get(name)

    def _check_names(self) -> None:
        expected = self._layout.state_dict(keep_vars=True)
        for name, tensor in expected.items():
            stored = self.stored_name(name)
            if stored is None and name not in self._tied:
                raise UserError(
                    f"{self.path} lacks the tensor {name}: give a complete {type(self._layout).__name__} checkpoint."
                )
            if stored is not None and self._names[stored] != tuple(tensor.shape):
                raise UserError(
                    f"{stored} in {self.path} has shape {list(self._names[stored])} where config.json "
                    f"implies {list(tensor.shape)}: use the config.json that belongs to these weights."
                )

    def _read(self, stored: str) -> Tensor:
        linear = stored.removesuffix(".weight")
        if linear not in self._packed:
            return self._shards.read(stored)
        held = [part for part in packed.PARTS if f"{linear}.{part}" in self._shards.entries]
        parts = dict(zip(held, (self._shards.read(f"{linear}.{part}") for part in held), strict=True))
        return packed.decode(parts, self._bits, linear).to(self.dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the folder's tokenizer, or refuse in a sentence."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self._trust, local_files_only=True)
        # Tokenizers are read by code of many kinds, whose errors have no common class.
        except Exception as error:
            raise UserError(
                f"{self.path} has no tokenizer that transformers can load ({first_line(error)}): add its files."
            ) from error

    def start_token(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Return the token that every text begins with, where the family needs one."""
        first = tokenizer.bos_token_id if self.spec.needs_start else None
        return first if isinstance(first, int) else None

    @property
    def rows(self) -> int:
        """How many tokens the embedding has a row for."""
        return self._layout.get_parameter(f"{self.spec.embedding}.weight").shape[0]

    def skeleton(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """Build the causal model in eval mode with everything but the blocks' parameters on `device`.

        Attention is "sdpa" where the class supports it and "eager" elsewhere; weights are in `self.dtype`, tied where
        the configuration says so; the blocks' parameters stay on the meta device until `load_block`.
        """
        model = empty_model(self.config, trust_remote_code=self._trust)
        inside = f"{self.spec.blocks}."
        outside = [name for name in model.state_dict(keep_vars=True) if not name.startswith(inside)]
        found = {name: stored for name in outside if (stored := self.stored_name(name)) is not None}
        state = {name: self._to_compute(self._sound(stored)).to(device) for name, stored in found.items()}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights(missing_keys=set(outside) - set(found), recompute_mapping=False)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    setattr(module, name, buffer.to(device))
        return model.requires_grad_(False)

    def _to_compute(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of blocks."""
        found = model.get_submodule(self.spec.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    def block_module_path(self, i: int) -> str:
        """Return the path of block `i` in the model."""
        return f"{self.spec.blocks}.{i}"

    def block_names(self, i: int) -> dict[str, str]:
        """Return the tensors of block `i`: name relative to the block, and name in the file."""
        names = self.blocks(self._layout)[i].state_dict(keep_vars=True)
        found = ((name, self.stored_name(f"{self.block_module_path(i)}.{name}")) for name in names)
        return {name: stored for name, stored in found if stored is not None}

    def block_state(self, i: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read block `i` alone: names relative to the block, in the stored dtype unless `dtype` is given.

        Raises `UserError` naming the first tensor with a NaN or an infinity.
        """
        state: dict[str, Tensor] = {}
        for name, stored in self.block_names(i).items():
            tensor = self._sound(stored)
            state[name] = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        return state

    def _sound(self, stored: str) -> Tensor:
        tensor = self._read(stored)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{stored} in {self.path} holds NaN or infinite weights: give a sound checkpoint.")
        return tensor

    def check_sound(self) -> None:
        """Read every tensor once, and raise `UserError` naming the first with a NaN or an infinity."""
        for stored in self._names:
            self._sound(stored)

    def load_block(self, skeleton: nn.Module, i: int, device: torch.device | str = "cpu") -> nn.Module:
        """Give block `i` of the skeleton its weights, in `self.dtype` on `device`, and return the block."""
        block = self.blocks(skeleton)[i]
        state = {name: tensor.to(device) for name, tensor in self.block_state(i, self.dtype).items()}
        block.load_state_dict(state, assign=True)
        return block

    def unload_block(self, skeleton: nn.Module, i: int) -> None:
        """Take the weights of block `i` out of memory; its computed buffers stay."""
        block = self.blocks(skeleton)[i]
        block.load_state_dict({name: tensor.to("meta") for name, tensor in block.state_dict().items()}, assign=True)

    def linears(self, block: nn.Module | None = None) -> tuple[str, ...]:
        """Return the relative names of every `nn.Linear` in a block (the first one if none is given), in order."""
        block = self.blocks(self._layout)[0] if block is None else block
        return tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))

    def packed_linears(self, i: int) -> tuple[str, ...]:
        """Return the relative names of the linears of block `i` that are stored quantized."""
        stored = self.block_names(i)
        return tuple(
            name for name in self.linears() if stored[f"{name}.weight"].removesuffix(".weight") in self._packed
        )

    def all_linears(self) -> tuple[str, ...]:
        """Return the full names of every `nn.Linear` of the model, inside and outside the blocks."""
        return tuple(name for name, module in self._layout.named_modules() if isinstance(module, nn.Linear))

    def linear_shapes(self, i: int = 0) -> dict[str, tuple[int, int]]:
        """Return (outputs, inputs) of every linear in block `i`."""
        modules = self.blocks(self._layout)[i].named_modules()
        return {name: (item.out_features, item.in_features) for name, item in modules if isinstance(item, nn.Linear)}

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every stored tensor outside the blocks under its stored name, bit for bit (packed linears decoded).

        A head that stands for the embedding too is given as the embedding, where runtimes look for it.
        """
        blocks = f"{self.spec.blocks}."
        for name, stored in self._stored.items():
            if not name.startswith(blocks):
                yield name if self._tied.get(stored) == name else stored, self._read(stored)

    def stored_bytes(self) -> int:
        """Return the bytes of all shards."""
        return sum(file.stat().st_size for file in self._shards.files)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every parameter of the model, tied ones once."""
        return {name: tuple(item.shape) for name, item in self._layout.named_parameters() if name not in self._tied}

    def side_files(self) -> list[Path]:
        """Return the folder's files that are not weights, index or config.json: the tokenizer and its kin.

        Code counts only where it is trusted.
        """
        excluded = _WEIGHTS if self._trust else (*_WEIGHTS, "*.py")
        found = sorted([*self.path.iterdir(), *self.path.glob(TEMPLATES)])
        files = (file for file in found if file.is_file())
        return [file for file in files if not any(file.match(pattern) for pattern in excluded)]

    @cached_property
    def _fingerprint(self) -> str:
        shapes = {name: list(entry.shape) for name, entry in sorted(self._shards.entries.items())}
        text = (self.path / "config.json").read_text(encoding="utf-8") + json.dumps(shapes) + self._shards.digest()
        return hashlib.sha256(text.encode()).hexdigest()

    def fingerprint(self) -> str:
        """Return a sha256 over config.json, the tensors' names and shapes, and the bytes of every shard."""
        return self._fingerprint
