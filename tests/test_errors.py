"""What counts as memory that ran out, whoever says it, and what does not."""

from __future__ import annotations

import pytest

from makeweight.errors import out_of_memory

RAN_OUT = (
    MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_memory_that_ran_out_is_known_by_its_words(error: Exception) -> None:
    assert out_of_memory(error)


def test_other_failures_are_none() -> None:
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
