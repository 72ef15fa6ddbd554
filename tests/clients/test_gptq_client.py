"""GPTQ and AWQ folders in auto-round's kernels on a CPU: every weight is the dense export's, and so are the logits.

Its torch kernels multiply in float16 and pass on bfloat16, rounding twice. Weights are therefore read once more in
float32, where products are exact, and must round to those of the dense folder without exception. Logits may differ by
what bfloat16 costs: `noise` is how far it takes the dense model's own from float32, and two models that round in
different places may lie twice that apart. In float32 only the rounding of the dense weights is left, which is less.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.environments import CONSTRAINTS, ask, python_with

SCRIPT = Path(__file__).with_name("auto_round_script.py")
TORCH = "auto_round_extension.torch.qlinear_torch"
KERNELS = {"gptq-v1": f"{TORCH}_zp", "auto-round": TORCH, "awq": "auto_round_kernel.qlinear"}
CASES = [
    ("W4A16g64_sym", "gptq-v1"),
    ("W3A16g64_sym", "gptq-v1"),
    ("W2A16g64", "auto-round"),
    ("W3A16g64", "auto-round"),
    ("W4A16g64", "auto-round"),
    ("W8A16", "auto-round"),
    ("W4A16g64_sym", "awq"),
    ("W4A16g64", "awq"),
]

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def python() -> Path:
    install = ["-c", str(CONSTRAINTS), "transformers", "accelerate", "auto-round==0.16.1", "auto-round-lib==0.16.0"]
    return python_with("auto-round", ["torch==2.13.0"], install)


@pytest.mark.parametrize(("scheme", "form"), CASES)
def test_weights_and_logits(
    scheme: str, form: str, python: Path, exported: Callable[[str, str], Path], tell: Callable[[str], None]
) -> None:
    found = ask(python, SCRIPT, str(exported(scheme, form)), str(exported(scheme, "dense")))
    tell(f"auto-round {form} {scheme}: {found}")
    assert found["kernels"] == [KERNELS[form]]
    assert (found["linears"], found["unequal"]) == (210, 0)
    assert found["bfloat16"] <= 2 * found["noise"], found
    assert found["float32"] <= found["noise"], found
