"""llama.cpp's format: one file of blocks, metadata and tokenizer, written a block of the model at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from makeweight.export import gguf_blocks, gguf_vocab
from makeweight.export.base import Facts, Format
from makeweight.export.gguf_blocks import Block
from makeweight.export.gguf_file import BF16, F16, F32, decode, stored_tensors
from makeweight.export.gguf_model import FAMILIES, ROPE_FREQS, Model
from makeweight.models import packed

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from makeweight.export.solved import Solved

QUANTIZATION_VERSION = 2


class Gguf(Format):
    """A folder with one .gguf file; tensors that were not quantized keep their values."""

    name = "gguf"

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        block = gguf_blocks.block_for(facts)
        newest = isinstance(block, Block) and block.name == "Q2_0"
        return ("llama.cpp since July 2026" if newest else "llama.cpp", "node-llama-cpp 3.22")

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        if importlib.util.find_spec("gguf") is None:
            return "the gguf package is missing, run `pip install gguf`"
        if facts.architecture not in FAMILIES:
            return f"{facts.architecture} is not among {', '.join(FAMILIES)}"
        block = gguf_blocks.block_for(facts)
        if isinstance(block, str):
            return block
        if not facts.fp16_scales:
            return "some scales are no float16 values, quantize with --scale-dtype float16"
        if not facts.config:
            return None
        model = Model(facts.architecture, facts.config)
        reason = model.refusal()
        if reason is None and (unknown := next((name for name in facts.kept if model.name(name) is None), None)):
            reason = f"it holds {unknown}, which has no name in GGUF's {model.family.arch}"
        if reason is None and facts.folder is not None:
            reason = gguf_vocab.refusal(facts.folder, model.rows)
        return reason

    def weight_bits(self, facts: Facts) -> float:  # noqa: D102
        block = gguf_blocks.block_for(facts)
        assert isinstance(block, Block), block
        return 8 * block.nbytes / block.size

    def tolerance(self, facts: Facts) -> float:  # noqa: D102
        return gguf_blocks.rounding(facts)

    def write(self, solved: Solved, folder: Path) -> None:  # noqa: D102
        from gguf import GGUFWriter

        block = gguf_blocks.block_for(solved.facts)
        assert isinstance(block, Block), block
        model, title = _model(solved), solved.path.resolve().name
        writer = GGUFWriter(folder / f"{title}-{block.name}.gguf", model.family.arch)
        writer.add_type("model")
        writer.add_name(title)
        writer.add_file_type(block.file_type)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        model.describe(writer)
        gguf_vocab.add(writer, solved.path, model.rows)
        factors = model.rope_factors()
        if factors is not None:
            _announce(writer, ROPE_FREQS, tuple(factors.shape), F32, factors.nbytes)
        for name, shape in _outline(solved):
            if name in solved.facts.shapes:
                nbytes = shape[0] * shape[1] // block.size * block.nbytes
                _announce(writer, _known(model, f"{name}.weight"), shape, block.kind, nbytes)
            else:
                kind, dtype = _kind(solved.shards.entries[name].dtype, shape)
                nbytes = solved.shards.entries[name].size * dtype.itemsize
                _announce(writer, _known(model, name), shape, kind, nbytes)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            for data in _data(solved, model, block):
                writer.write_tensor_data(data)
        finally:
            writer.close()

    def read(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        model, stored = _model(solved), stored_tensors(_file(folder))
        for name in solved.names:
            tensor = f"{name}.weight"
            yield name, model.restore(tensor, decode(stored[_known(model, tensor)]))

    def read_kept(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        model, stored = _model(solved), stored_tensors(_file(folder))
        own = {_known(model, f"{name}.weight") for name in solved.names}
        if model.rope_factors() is not None:
            own.add(ROPE_FREQS)
        names = {model.name(name): name for name in solved.shards.entries}
        for theirs in stored.keys() - own:
            name = names.get(theirs, theirs)
            yield name, model.restore(name, decode(stored[theirs]))


def _model(solved: Solved) -> Model:
    return Model(solved.facts.architecture, solved.config)


def _file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def _known(model: Model, name: str) -> str:
    found = model.name(name)
    assert found is not None, f"{name} has no name in GGUF, which was to be refused"
    return found


def _outline(solved: Solved) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes in the order of `_data`: of each shard, what was kept and then the linears."""
    linears, entries = solved.facts.shapes, solved.shards.entries
    for file in solved.shards.files:
        inside = sorted(name for name, entry in entries.items() if entry.file == file)
        parts = {name for name in inside if _linear(name) in linears}
        yield from ((name, entries[name].shape) for name in inside if name not in parts)
        yield from ((name, linears[name]) for name in sorted({_linear(name) for name in parts}))


def _linear(name: str) -> str:
    """Return the linear that a stored tensor may be a packed part of, "" for a tensor of another kind."""
    linear, _, part = name.rpartition(".")
    return linear if part in packed.PARTS else ""


def _data(solved: Solved, model: Model, block: Block) -> Iterator[NDArray[Any]]:
    for part in solved.parts():
        for name, tensor in sorted(part.kept.items()):
            _, dtype = _kind(tensor.dtype, tuple(tensor.shape))
            values = model.reorder(name, tensor).to(dtype).contiguous()
            yield (values.view(torch.uint16) if dtype == torch.bfloat16 else values).numpy()
        for name, linear in sorted(part.quantized.items()):
            yield gguf_blocks.pack(model.reorder_codes(f"{name}.weight", linear), block)


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, torch.dtype]:
    """Return the type that keeps a tensor's values: its own, but float32 for the vectors that llama.cpp wants so."""
    if len(shape) > 1 and dtype in (torch.float16, torch.bfloat16):
        return (F16 if dtype == torch.float16 else BF16), dtype
    return F32, torch.float32


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: int, nbytes: int) -> None:
    # Any dtype but uint8 lets the shape count weights rather than bytes, for which the writer would have to know the
    # type; and as a number it is also written where it does not.
    writer.add_tensor_info(name, shape, np.dtype(np.int8), nbytes, raw_dtype=cast(Any, kind))
