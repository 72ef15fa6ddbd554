"""What tests of whole runs share: a text, a tiny model, and an estimate that costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import a_text
from tests.tiny import tiny_folder


@pytest.fixture
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a run the measurement behind its estimate."""
    from makeweight.estimate import work

    monkeypatch.setattr(work, "matmul_rate", lambda device, **kind: 1e12)
    monkeypatch.setattr(work, "step_rate", lambda *work, **kind: 1e12)
    monkeypatch.setattr(work, "elementwise_rate", lambda *work, **kind: 1e10)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is long enough for every run."""
    return a_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three blocks, in several shards."""
    return tiny_folder("llama", tmp_path_factory.mktemp("source") / "llama", max_shard_size="100KB")
