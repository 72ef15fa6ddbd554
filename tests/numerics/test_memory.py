"""Peak memory is what the process really held."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import pytest
import torch

from makeweight.numerics.memory import (
    keep_freed_memory,
    machine_memory,
    peak_memory,
    release_freed_memory,
    reset_peak_memory,
)

SIZE = 200_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can start counting anew")
def test_the_peak_rises_with_what_is_held_and_starts_anew() -> None:
    gc.collect()
    release_freed_memory()  # else what earlier tests have left may be handed back meanwhile
    reset_peak_memory()
    before = peak_memory()
    held = torch.ones(SIZE, dtype=torch.uint8)
    assert peak_memory() >= before + 0.9 * SIZE
    del held
    reset_peak_memory()
    assert peak_memory() < before + 0.5 * SIZE


def test_asking_the_allocator_is_harmless() -> None:
    keep_freed_memory()
    assert peak_memory() > 1_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be asked")
def test_freed_buffers_stay_until_they_are_released() -> None:
    keep_freed_memory()
    before = resident()
    pieces = [torch.ones(1_000_000, dtype=torch.uint8) for _ in range(200)]
    del pieces
    kept = resident()
    release_freed_memory()
    assert resident() < kept - 0.5 * SIZE
    assert resident() < before + 0.2 * SIZE


def resident() -> int:
    """Return the process's resident bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_the_machine_has_more_than_this_process_takes() -> None:
    there = machine_memory()
    assert there is None or there > peak_memory()
