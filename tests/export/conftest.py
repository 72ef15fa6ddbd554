"""A folder with a small model and a text, for tests of what is written from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import a_text
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    a_text(folder / "words.txt")
    tiny_folder("llama-tied", folder / "source")
    return folder
