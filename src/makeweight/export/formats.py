"""Every format by name: one row each."""

from makeweight.export.awq import Awq
from makeweight.export.base import Format
from makeweight.export.compressed_tensors import CompressedTensors
from makeweight.export.dense import Dense
from makeweight.export.gguf import Gguf
from makeweight.export.gptq import AutoRound, Gptq, GptqV1
from makeweight.export.onnx import Onnx

FORMATS: dict[str, Format] = {
    form.name: form for form in (CompressedTensors(), Dense(), Gptq(), GptqV1(), AutoRound(), Awq(), Onnx(), Gguf())
}
