"""Every format by name: one row each."""

from makeweight.export.base import Format
from makeweight.export.compressed_tensors import CompressedTensors
from makeweight.export.dense import Dense

FORMATS: dict[str, Format] = {form.name: form for form in (CompressedTensors(), Dense())}
