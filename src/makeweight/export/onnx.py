"""ONNX: a whole model that ONNX Runtime runs, every quantized linear being one of its MatMulNBits nodes.

Codes of 2, 4 or 8 bits lie along the inputs, low bits first, and so do the zero-points of a row; both are unsigned.
3 bits are kept as 4, and 5 to 7 as 8, at the same values. A scale belongs to a block of 16, 32, 64, 128 or 256 inputs;
a group of another size becomes several blocks with the same scale. `accuracy_level` stays unset, so that what enters a
linear stays float32; at 4, ONNX Runtime is faster and rounds it to 8 bits.
Source: microsoft/onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from makeweight.export import onnx_graph as graph
from makeweight.export.base import Facts, Format
from makeweight.export.folder import copy_files
from makeweight.export.hf import write_json
from makeweight.export.onnx_graph import CODES, COS, SCALES, SIN, ZEROS, Layout
from makeweight.models.shards import required_json
from makeweight.models.spec import HeadShape
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto
    from transformers import PretrainedConfig

    from makeweight.export.solved import Solved

MODEL, DATA = "model.onnx", "model.onnx.data"
SMALLEST, LARGEST, REPEATED = 16, 256, 128
"""The smallest and largest block, and the largest that stands for a part of a group (more runtimes are fast there)."""
PAGE = 4096
"""Tensors begin at multiples of this, so that a runtime can map them from the file."""


def stored_bits(scheme: Scheme) -> int:
    """Return how many bits a code takes: the next of 2, 4 and 8."""
    return next(bits for bits in (2, 4, 8) if bits >= scheme.bits)


def block_of(group: int) -> int | None:
    """Return how many inputs share a stored scale where `group` share a solved one; None where nothing fits."""
    power = group & -group
    if power < SMALLEST:
        return None
    return power if power == group <= LARGEST else min(power, REPEATED)


def pack(tensor: QTensor) -> tuple[Layout, dict[str, Tensor]]:
    """Return a linear's layout, and its codes (O, blocks, bytes), scales (O, blocks) and zero-points (O, bytes).

    Without zero-points the middle of the range, 2**(bits - 1), is the zero of every block.
    """
    height, width = tensor.codes_OI.shape
    group = width // tensor.scale_OG.shape[1]
    bits, block = stored_bits(tensor.scheme), block_of(group)
    assert block is not None, "refused before"
    repeats = group // block
    parts = {
        CODES: _pack_rows(tensor.codes_OI, bits).view(height, width // block, block * bits // 8),
        SCALES: tensor.scale_OG.float().repeat_interleave(repeats, 1),
    }
    if tensor.zero_OG is not None:
        parts[ZEROS] = _pack_rows(tensor.zero_OG.repeat_interleave(repeats, 1), bits)
    return Layout(outputs=height, inputs=width, bits=bits, block=block), parts


def _pack_rows(signed_RN: Tensor, bits: int) -> Tensor:
    """Turn signed integers into rows of bytes, the middle of the range added and each row filled up with zeros."""
    per_byte = 8 // bits
    values_RN = (signed_RN.short() + (1 << bits - 1)).to(torch.uint8)
    values_RN = torch.nn.functional.pad(values_RN, (0, -values_RN.shape[1] % per_byte))
    packed_RB = torch.zeros(values_RN.shape[0], values_RN.shape[1] // per_byte, dtype=torch.uint8)
    for place in range(per_byte):
        packed_RB |= values_RN[:, place::per_byte] << place * bits
    return packed_RB


def unpack_rows(packed_RB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the first `count` unsigned integers of every row of bytes."""
    single_RN = np.unpackbits(packed_RB, axis=1, count=count * bits, bitorder="little")
    return sum((single_RN[:, i::bits] << i for i in range(bits)), np.zeros((), np.uint8))


class DataFile:
    """Appends tensors to one file; what a graph says of them is kept in `tensors`."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.tensors: dict[str, TensorProto] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor in its own dtype."""
        from onnx import TensorProto

        kinds = {
            torch.float64: TensorProto.DOUBLE,
            torch.float32: TensorProto.FLOAT,
            torch.float16: TensorProto.FLOAT16,
            torch.bfloat16: TensorProto.BFLOAT16,
            torch.uint8: TensorProto.UINT8,
            torch.int8: TensorProto.INT8,
            torch.int16: TensorProto.INT16,
            torch.int32: TensorProto.INT32,
            torch.int64: TensorProto.INT64,
            torch.bool: TensorProto.BOOL,
        }
        self.stream.write(bytes(-self.stream.tell() % PAGE))
        offset = self.stream.tell()
        self.stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        proto = TensorProto(name=name, dims=tensor.shape, data_type=kinds[tensor.dtype])
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", offset), ("length", tensor.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self.tensors[name] = proto


class Written:
    """Reads a written folder through the onnx package, one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        import onnx

        self.folder = folder
        whole = onnx.load(folder / MODEL, load_external_data=False).graph
        self.tensors = {tensor.name: tensor for tensor in whole.initializer}
        self.linears = {node.name: node for node in whole.node if node.op_type == "MatMulNBits"}

    def array(self, name: str) -> np.ndarray:
        """Return one stored tensor."""
        from onnx import TensorProto, numpy_helper

        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[name])  # reading keeps the bytes in the message
        return numpy_helper.to_array(tensor, str(self.folder))

    def weight(self, node: NodeProto) -> Tensor:
        """Return the weight (O, I) in float32 that a node multiplies with."""
        from onnx import helper

        facts = {found.name: helper.get_attribute_value(found) for found in node.attribute}
        rows, width, bits, block = (int(facts[key]) for key in ("N", "K", "bits", "block_size"))
        codes_OI = unpack_rows(self.array(node.input[1]).reshape(rows, -1), bits, width)
        zero_OG = np.full((rows, width // block), 1 << bits - 1, np.uint8)
        if len(node.input) > 3 and node.input[3]:
            zero_OG = unpack_rows(self.array(node.input[3]), bits, width // block)
        centred_OI = codes_OI.astype(np.float32) - zero_OG.repeat(block, 1)
        return torch.from_numpy(centred_OI * self.array(node.input[2]).repeat(block, 1))

    def kept(self) -> list[str]:
        """Return the tensors that belong to the model and to no quantized linear; a slash begins the graph's own."""
        own = {name for node in self.linears.values() for name in node.input[1:4]}
        return [name for name in self.tensors if name not in own and not name.startswith("/")]


class Onnx(Format):
    """A folder with `model.onnx`, its data, and what onnxruntime-genai needs to chat with it."""

    name = "onnx"

    def loads(self, facts: Facts) -> tuple[str, ...]:  # noqa: D102
        return ("ONNX Runtime 1.32", "onnxruntime-genai 0.18")

    def refusal(self, facts: Facts) -> str | None:  # noqa: D102
        if facts.architecture not in graph.ARCHITECTURES:
            return f"{facts.architecture} is none of {', '.join(graph.ARCHITECTURES)}"
        if facts.scheme.activations != 16:
            return "MatMulNBits does not round what enters a linear token by token, as W8A8 means"
        for name, (_, width) in facts.shapes.items():
            if not name.startswith(f"{graph.SPEC.blocks}."):
                return f"its tensors are named without a prefix ({name}), save it once with AutoModelForCausalLM"
            group = width if facts.scheme.group_size == -1 else facts.scheme.group_size
            if block_of(group) is None:
                return f"{name} has groups of {group} inputs, and a block of MatMulNBits has a multiple of {SMALLEST}"
        if facts.config and (reason := graph.misfit(_config(facts.config))):
            return reason
        if importlib.util.find_spec("onnx") is None:
            return "the onnx package is missing, run `pip install onnx`"
        return None

    def weight_bits(self, facts: Facts) -> float:  # noqa: D102
        bits, group = stored_bits(facts.scheme), facts.scheme.group_size
        blocks = [block_of(width if group == -1 else group) or SMALLEST for _, width in facts.shapes.values()]
        return bits + (32 + (0 if facts.scheme.symmetric else bits)) / min(blocks, default=SMALLEST)

    def write(self, solved: Solved, folder: Path) -> None:  # noqa: D102
        import onnx

        config = _config(solved.config)
        layouts: dict[str, Layout] = {}
        with ExitStack() as stack:
            data = DataFile(stack.enter_context((folder / DATA).open("wb")))
            for part in solved.parts():
                for name, tensor in part.kept.items():
                    data.add(name, tensor)
                for name, tensor in part.quantized.items():
                    layouts[name], packed = pack(tensor)
                    for suffix, stored in packed.items():
                        data.add(f"{name}.{suffix}", stored)
            for name, table in zip((COS, SIN), graph.rotary_tables(config), strict=True):
                data.add(name, table)
        onnx.save(graph.Decoder(config, data.tensors, layouts).build(), folder / MODEL)
        onnx.checker.check_model(str(folder / MODEL))
        copy_files(solved.side_files(), solved.path, folder)
        write_json(folder / "config.json", solved.config)
        write_json(folder / "genai_config.json", genai_config(config, folder))

    def read(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        written = Written(folder)
        assert written.linears.keys() == set(solved.names), "a node for every quantized linear, and none besides"
        for name in solved.names:
            yield name, written.weight(written.linears[name])

    def read_kept(self, solved: Solved, folder: Path) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        written = Written(folder)
        for name in written.kept():
            yield name, torch.from_numpy(written.array(name).astype(np.float32))


def _config(raw: Any) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(raw))  # transformers fills in what lies inside


def genai_config(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """Return what onnxruntime-genai reads besides the model; generation_config.json goes before config.json."""
    file = folder / "generation_config.json"
    said = {**config.to_dict(), **(required_json(file) if file.is_file() else {})}
    heads = HeadShape.of(config)
    decoder = {
        "filename": MODEL,
        "head_size": heads.dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.kv,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    tokens = {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if said.get(key) is not None}
    model = {
        **tokens,
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "decoder": decoder,
    }
    chosen = {key: said[key] for key in ("do_sample", "temperature", "top_k", "top_p") if said.get(key) is not None}
    search = {"max_length": config.max_position_embeddings, "past_present_share_buffer": True, **chosen}
    return {"model": model, "search": search}
