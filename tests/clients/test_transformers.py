"""transformers computes the same from a compressed-tensors folder as from the dense one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import environments

SCRIPT = Path(__file__).with_name("logits_script.py")
TOLERANCE = 1e-5
"""Of the largest logit, in float32: a hundred units in its last place; 0 was measured for every scheme."""


def python() -> Path:
    """Return an interpreter with transformers and compressed-tensors at the versions of constraints.txt."""
    pinned = re.findall(r"^(?:torch|transformers|compressed-tensors)==.*$", environments.CONSTRAINTS.read_text(), re.M)
    return environments.python_with("transformers", pinned)


@pytest.mark.client
@pytest.mark.parametrize("scheme", ["W4A16g64", "W4A16g64_sym", "W3A16g64", "W2A16", "W8A16", "W8A8"])
def test_logits_equal_the_dense_folder(
    scheme: str, exported: Callable[[str, str], Path], tell: Callable[[str], None]
) -> None:
    folders = (exported(scheme, "compressed-tensors"), exported(scheme, "dense"))
    found = environments.ask(python(), SCRIPT, *map(str, folders))
    tell(f"transformers {scheme}: logits off by {found['away']:.2g}, the largest is {found['largest']:.1f}")
    assert found["tokens"] > 40
    assert found["away"] <= TOLERANCE * found["largest"], found
