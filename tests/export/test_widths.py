"""What formats take on disk is known before anything is solved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from makeweight.export import onnx
from makeweight.export.formats import FORMATS
from makeweight.export.run import export_model
from makeweight.export.solved import Solved
from makeweight.job import Job
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from tests.runs import small

SCHEMES = ("W2A16g32", "W3A16g32_sym", "W4A16g32", "W5A16g32", "W6A16g32")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_takes_what_is_said_of_it(scheme: str, root: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    recipe = small(
        root / "source", root / f"width-{scheme}", root / "words.txt", method="rtn", scheme=Scheme.parse(scheme)
    )
    said = Job.prepare(recipe).facts()
    quantize(recipe)
    solved = Solved(root / f"width-{scheme}")
    linears = [tensor for part in solved.parts() for tensor in part.quantized.values()]
    count = sum(tensor.codes_OI.numel() for tensor in linears)
    nbytes = sum(part.nbytes for tensor in linears for part in onnx.pack(tensor)[1].values())
    filled = pytest.approx(8 * nbytes / count, rel=0.03)  # zero-points of a short row do not fill their byte
    assert FORMATS["onnx"].weight_bits(said) == filled
    assert FORMATS["gptq"].weight_bits(said) is None
    (item,) = export_model(solved.path, ["gguf"], out=root / f"formats-{scheme}")
    from gguf import GGUFReader

    stored = GGUFReader(next(item.path.glob("*.gguf"))).tensors
    packed = [t for t in stored if t.name.startswith("blk.") and t.name.endswith(".weight") and "norm" not in t.name]
    assert sum(int(t.n_elements) for t in packed) == count
    assert FORMATS["gguf"].weight_bits(solved.facts) == 8 * sum(int(t.n_bytes) for t in packed) / count
    assert (FORMATS["gguf"].weight_bits(said) or 0) >= (FORMATS["gguf"].weight_bits(solved.facts) or 0)


def test_the_disk_of_a_run_counts_them(root: Path) -> None:
    recipe = small(root / "source", root / "none", root / "words.txt", method="rtn", scheme=Scheme.parse("W2A16g32"))
    alone, both = (Job.prepare(replace(recipe, formats=formats)).estimate().disk_bytes for formats in ((), ("gguf",)))
    weights = sum(rows * columns for rows, columns in Job.prepare(recipe).facts().shapes.values())
    assert both == pytest.approx(2 * alone + weights * (4.5 - 2.0 - 18 / 32) / 8), "2 bits lie in blocks of 4.5"
