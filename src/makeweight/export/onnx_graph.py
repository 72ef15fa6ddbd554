"""A decoder of the LLaMA family as a graph of ONNX operators and some of ONNX Runtime's own.

Inputs are tokens, the mask of all tokens so far, and the keys and values of those before; outputs are logits and the
keys and values of all. Names are those that onnxruntime-genai and optimum give them. Activations are float32.

Shapes: B texts, S new tokens, P earlier ones, T = P + S, E channels of a head, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from makeweight.models.llama import SPEC
from makeweight.models.spec import HeadShape

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
    from transformers import PretrainedConfig

RUNTIME = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
OPSET, IR_VERSION = 23, 10
"""Of ONNX 1.18, because of RMSNormalization; the file itself is as ONNX 1.16 wrote it."""
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ROTARIES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles are the same for every length of text."""
COS, SIN = "/rotary/cos", "/rotary/sin"
CODES, SCALES, ZEROS = "codes", "scales", "zeros"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a quantized linear is stored: its sizes, the bits of a stored code, and how many share a stored scale."""

    outputs: int
    inputs: int
    bits: int
    block: int


def misfit(config: PretrainedConfig) -> str | None:
    """Return a clause on what this graph cannot express of a configuration, None where it can express all."""
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    width = HeadShape.of(config).dim
    if config.hidden_act != "silu":
        return f"its MLP has the activation {config.hidden_act}, and the graph has silu"
    if rotary not in FIXED_ROTARIES:
        return f"its rotary positions ({rotary}) change with the length of the text"
    if width % 16:
        return f"its heads have {width} channels, not a multiple of 16"
    return None


def windows(config: PretrainedConfig) -> list[int]:
    """Return how many tokens each layer's attention looks back on, itself included; -1 means all."""
    window = getattr(config, "sliding_window", None) or -1
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else -1 for kind in kinds]


def rotary_tables(config: PretrainedConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (positions, E / 2) in float32 as transformers computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary: Any = LlamaRotaryEmbedding  # one formula, of which every family here has a copy
    positions = torch.arange(config.max_position_embeddings).unsqueeze(0)
    cos, sin = rotary(config)(torch.zeros(1), positions)
    half = cos.shape[-1] // 2  # its second half repeats the first
    return cos[0, :, :half], sin[0, :, :half]


class Decoder:
    """Puts the graph together; `tensors` are the stored ones by full name, `layouts` those of the quantized linears."""

    def __init__(
        self, config: PretrainedConfig, tensors: Mapping[str, TensorProto], layouts: Mapping[str, Layout]
    ) -> None:
        self.config, self.tensors, self.layouts = config, tensors, layouts
        self.heads = HeadShape.of(config)
        self.windows = windows(config)
        self.nodes: list[NodeProto] = []
        self.floats: dict[str, str] = {}
        self.constants: dict[str, TensorProto] = {}

    def build(self) -> ModelProto:
        """Return the whole model, its initializers being `tensors` and a few constants."""
        from onnx import TensorProto, helper

        def value(name: str, *shape: str | int, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        heads, width = self.heads.kv, self.heads.dim
        states = [f"{i}.{part}" for i in range(self.config.num_hidden_layers) for part in ("key", "value")]
        starts = [
            value("input_ids", "batch", "new", kind=TensorProto.INT64),
            value("attention_mask", "batch", "total", kind=TensorProto.INT64),
            *(value(f"past_key_values.{name}", "batch", heads, "past", width) for name in states),
        ]
        ends = [
            value("logits", "batch", "new", self.config.vocab_size),
            *(value(f"present.{name}", "batch", heads, "total", width) for name in states),
        ]
        self._body()
        stored = [*self.tensors.values(), *self.constants.values()]
        graph = helper.make_graph(self.nodes, "decoder", starts, ends, stored)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(RUNTIME, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="makeweight")

    def _body(self) -> None:
        from onnx import TensorProto

        assert SPEC.final_norm is not None and SPEC.head is not None
        counted = self._add("ReduceSum", "attention_mask", self._integers("/axis", [1]), keepdims=0)
        last = self._add("Sub", counted, self._integers("/one", [1]))
        total = self._add("Gather", self._add("Shape", "attention_mask"), self._integers("/dimension", 1))
        self.last = self._add("Cast", last, to=TensorProto.INT32)
        self.total = self._add("Cast", total, to=TensorProto.INT32)

        embedding = f"{SPEC.embedding}.weight"
        hidden = self._as_float(self._add("Gather", embedding, "input_ids"), self.tensors[embedding].data_type)
        for i in range(self.config.num_hidden_layers):
            hidden = self._block(i, f"{SPEC.blocks}.{i}", hidden)
        hidden = self._norm(SPEC.final_norm, hidden)
        apart = SPEC.head in self.layouts or f"{SPEC.head}.weight" in self.tensors
        self._linear(SPEC.head if apart else SPEC.embedding, hidden, output="logits")

    def _block(self, index: int, path: str, hidden: str) -> str:
        normed = self._norm(f"{path}.input_layernorm", hidden)
        hidden = self._add("Add", hidden, self._attention(index, f"{path}.self_attn", normed))
        normed = self._norm(f"{path}.post_attention_layernorm", hidden)
        gate = self._linear(f"{path}.mlp.gate_proj", normed)
        silu = self._add("Mul", gate, self._add("Sigmoid", gate))
        product = self._add("Mul", silu, self._linear(f"{path}.mlp.up_proj", normed))
        return self._add("Add", hidden, self._linear(f"{path}.mlp.down_proj", product))

    def _attention(self, index: int, path: str, normed: str) -> str:
        """Positions follow from the mask: a text's tokens start at 0, and padding lies to the right."""
        query, key, value = (self._linear(f"{path}.{name}_proj", normed) for name in "qkv")
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        (out, *_) = self._node(
            "GroupQueryAttention",
            [
                self._head_norm(f"{path}.q_norm", query),
                self._head_norm(f"{path}.k_norm", key),
                value,
                *past,
                self.last,
                self.total,
                COS,
                SIN,
            ],
            [f"/{len(self.nodes)}/attended", f"present.{index}.key", f"present.{index}.value"],
            domain=RUNTIME,
            num_heads=self.heads.query,
            kv_num_heads=self.heads.kv,
            do_rotary=1,
            local_window_size=self.windows[index],
        )
        return self._linear(f"{path}.o_proj", out)

    def _head_norm(self, path: str, rows: str) -> str:
        """Normalize every head for itself, where the family has a norm there."""
        if f"{path}.weight" not in self.tensors:
            return rows
        apart = self._add("Reshape", rows, self._integers("/heads", [0, 0, -1, self.heads.dim]))
        return self._add("Reshape", self._norm(path, apart), self._integers("/joined", [0, 0, -1]))

    def _norm(self, path: str, hidden: str) -> str:
        weight = self._value(f"{path}.weight")
        return self._add("RMSNormalization", hidden, weight, epsilon=self.config.rms_norm_eps)

    def _linear(self, path: str, hidden: str, *, output: str = "") -> str:
        layout, bias = self.layouts.get(path), f"{path}.bias"
        biased = self._value(bias) if bias in self.tensors else ""
        outputs = [output or f"/{path}"]
        if layout is not None:
            zeros = f"{path}.{ZEROS}" if f"{path}.{ZEROS}" in self.tensors else ""
            inputs = [hidden, f"{path}.{CODES}", f"{path}.{SCALES}", zeros, "", biased]
            while not inputs[-1]:
                inputs.pop()
            sizes = {"N": layout.outputs, "K": layout.inputs, "bits": layout.bits, "block_size": layout.block}
            return self._node("MatMulNBits", inputs, outputs, name=path, domain=RUNTIME, **sizes)[0]
        weight = self._value(f"{path}.weight")
        if not biased:
            return self._node("FusedMatMul", [hidden, weight], outputs, name=path, domain=RUNTIME, transB=1)[0]
        product = self._add("FusedMatMul", hidden, weight, domain=RUNTIME, transB=1)
        return self._node("Add", [product, biased], outputs)[0]

    def _value(self, name: str) -> str:
        """Return a stored tensor as float32; the runtime converts it once, when it loads the model."""
        if name not in self.floats:
            self.floats[name] = self._as_float(name, self.tensors[name].data_type)
        return self.floats[name]

    def _as_float(self, name: str, kind: int) -> str:
        from onnx import TensorProto

        return name if kind == TensorProto.FLOAT else self._add("Cast", name, to=TensorProto.FLOAT)

    def _integers(self, name: str, values: int | Sequence[int]) -> str:
        import numpy as np
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def _add(self, op: str, *inputs: str, domain: str = "", **attributes: float) -> str:
        return self._node(op, inputs, [f"/{len(self.nodes)}/{op}"], name="", domain=domain, **attributes)[0]

    def _node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        name: str = "",
        domain: str = "",
        **attributes: float,
    ) -> Sequence[str]:
        from onnx import helper

        node = helper.make_node(op, inputs, outputs, name or outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return outputs
