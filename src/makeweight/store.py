"""Solved blocks as shards of the output folder, and back: what is written, what is read, and that both are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from makeweight.export import compressed_tensors
from makeweight.export.folder import Folder, damaged
from makeweight.export.manifest import tensor_hash
from makeweight.methods.base import Params
from makeweight.models import packed
from makeweight.models.checkpoint import Checkpoint
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from makeweight.sweep.run import Committed


@dataclass(frozen=True, kw_only=True)
class Store:
    """The blocks of one run in its folder; `dtype` is that of the forward pass, `scale_dtype` that of solved scales."""

    ckpt: Checkpoint
    folder: Folder
    scheme: Scheme
    dtype: torch.dtype
    scale_dtype: torch.dtype

    def keep(self, index: int) -> None:
        """Write a block that is not quantized, bit for bit."""
        self.folder.write(index + 1, self._original(index), {})

    def commit(self, index: int, committed: Committed) -> None:
        """Write a block's shard, once what is read back from it decodes to what was solved."""
        names, tensors, cpu = self.ckpt.block_names(index), self._original(index), torch.device("cpu")
        codes = {name: tensor.to(cpu) for name, tensor in committed.codes.items()}  # packing is no work for a GPU
        stored_as = {name: compressed_tensors.widened(tensor, self.ckpt.dtype) for name, tensor in codes.items()}
        tensors |= {names[name]: tensor.cpu() for name, tensor in committed.rest.items()}
        for name, tensor in stored_as.items():
            stored = names[f"{name}.weight"]
            del tensors[stored]
            tensors |= compressed_tensors.pack(stored.removesuffix(".weight"), tensor)

        def verify(written: Mapping[str, Tensor]) -> None:
            for name, (_, parts) in self._parts(index, written).items():
                weight = compressed_tensors.unpack(parts, self.scheme.bits).to(self.dtype)
                if not torch.equal(weight, codes[name].dequantize(self.dtype)):
                    raise RuntimeError(f"{name} of block {index} reads back differently in {self.folder.path}")

        digest = {name: tensor.digest() for name, tensor in codes.items()}
        digest |= {name: tensor_hash(tensor) for name, tensor in committed.rest.items()}
        bits = {name: [tensor.bits_per_weight(), tensor.codes_OI.numel()] for name, tensor in stored_as.items()}
        self.folder.write(index + 1, tensors, {**committed.report, "digest": digest, "bits": bits}, verify)

    def refine(self, index: int, learned: Mapping[str, Tensor]) -> None:
        """Put what was learned, by block and name, into a shard; twice is the same as once."""
        codes, rest = self.solved(index)
        refined = {
            name: replace(
                tensor,
                scale_OG=learned[f"{index}.{name}"],
                codes_OI=learned.get(f"{index}.{name}.codes", tensor.codes_OI),
            )
            for name, tensor in codes.items()
        }
        rest |= {name: learned[f"{index}.{name}"] for name in rest if f"{index}.{name}" in learned}
        report = {k: v for k, v in (self.folder.report(index + 1) or {}).items() if k not in ("digest", "bits")}
        self.commit(index, Committed(codes=refined, rest=rest, report=report))

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return what a shard's block is run with, by name of a linear or of a parameter, in the forward's dtype."""
        codes, rest = self._undamaged(index)
        weights = {name: tensor.dequantize(self.dtype) for name, tensor in codes.items()}
        # By way of the checkpoint's dtype, as a block is loaded: rounding once is not the same as rounding twice.
        return {**weights, **{name: tensor.to(self.ckpt.dtype).to(self.dtype) for name, tensor in rest.items()}}

    def solved(self, index: int) -> tuple[dict[str, QTensor], Params]:
        """Return the codes of a shard's block and its other tensors as they are stored."""
        tensors, codes = self.folder.read(index + 1), {}
        for name, (linear, parts) in self._parts(index, tensors).items():
            codes_OI, scale_OG, zero_OG = packed.unpack(parts, (self.scheme.bits,), linear)
            scale_OG = scale_OG.to(self.scale_dtype)  # which holds them exactly
            codes[name] = QTensor(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG, scheme=self.scheme)
        # A linear of 8-bit codes lies under the name of its weight: it is no parameter beside the codes.
        names = self.ckpt.block_names(index)
        others = (name for name, stored in names.items() if stored in tensors)
        return codes, {name: tensors[names[name]] for name in others if name.removesuffix(".weight") not in codes}

    def mapped(self, index: int) -> tuple[dict[str, QTensor], Params]:
        """Return what `solved` does, its codes mapped from a scratch file: their memory can be taken back."""
        codes, rest = self._undamaged(index)
        self.folder.set_aside(name := f"codes-{index}.scratch", {key: held.codes_OI for key, held in codes.items()})
        lying = self.folder.scratch(name) or {}
        return {key: replace(held, codes_OI=lying[key]) for key, held in codes.items()}, rest

    def _undamaged(self, index: int) -> tuple[dict[str, QTensor], Params]:
        """Return what `solved` does; raises UserError where it is not what was written."""
        codes, rest = self.solved(index)
        found = {name: tensor.digest() for name, tensor in codes.items()}
        found |= {name: tensor_hash(tensor) for name, tensor in rest.items()}
        noted = (self.folder.report(index + 1) or {}).get("digest", {})
        if any(found.get(name) != digest for name, digest in noted.items()):
            raise damaged(self.folder.shard(index + 1))
        return codes, rest

    def _parts(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, dict[str, Tensor]]]:
        """Return every linear of a block with its name in the file and the parts that are stored of it."""
        names, found = self.ckpt.block_names(index), {}
        for name in self.ckpt.linears():
            linear = names[f"{name}.weight"].removesuffix(".weight")
            parts = {part: tensors[f"{linear}.{part}"] for part in packed.PARTS if f"{linear}.{part}" in tensors}
            found[name] = (linear, parts)
        return found

    def _original(self, index: int) -> dict[str, Tensor]:
        """Return a block's tensors under their names in the file, bit for bit."""
        names = self.ckpt.block_names(index)
        return {names[name]: tensor for name, tensor in self.ckpt.block_state(index).items()}
