"""The decomposition rebuilds the matrix, also where a driver gives up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from makeweight.numerics.svd import thin_svd

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
SHAPES = ((24, 24), (40, 12), (12, 40), (1, 9))


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_decomposes(weight: Tensor, tolerance: float) -> None:
    u, sigma, v = thin_svd(weight)
    rank = min(weight.shape)
    assert u.shape == (weight.shape[0], rank) and sigma.shape == (rank,) and v.shape == (weight.shape[1], rank)
    assert torch.all(sigma[:-1] >= sigma[1:]) and torch.all(sigma >= 0)
    eye = torch.eye(rank, dtype=u.dtype)
    close: Any = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(u * sigma @ v.T, weight.to(u.dtype), **close)
    torch.testing.assert_close(u.T @ u, eye, **close)
    torch.testing.assert_close(v.T @ v, eye, **close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decomposes(shape: tuple[int, int]) -> None:
    assert_decomposes(matrix(shape), 1e-5)
    assert_decomposes(matrix(shape, torch.float64), 1e-12)
    assert_decomposes(torch.zeros(shape), 1e-6)
    assert_decomposes(torch.ones(shape), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_widened(dtype: torch.dtype) -> None:
    low = matrix((16, 10), dtype)
    parts = thin_svd(low)
    assert {part.dtype for part in parts} == {torch.float32}
    assert_decomposes(low, 1e-5)
    for ours, wide in zip(parts, thin_svd(low.float()), strict=True):
        assert torch.equal(ours, wide)


def failing(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[torch.dtype]:
    """Let the first attempts fail, and record the dtype of each."""
    attempts: list[torch.dtype] = []
    real = torch.linalg.svd

    def svd(candidate: Tensor, **options: Any) -> Any:
        attempts.append(candidate.dtype)
        if len(attempts) <= failures:
            raise LinAlgError("the algorithm failed to converge")
        return real(candidate, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return attempts


def test_falls_back_to_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = failing(monkeypatch, 1)
    parts = thin_svd(matrix((20, 12)))
    assert attempts == [torch.float32, torch.float64]
    assert {part.dtype for part in parts} == {torch.float32}
    u, sigma, v = parts
    torch.testing.assert_close(u * sigma @ v.T, matrix((20, 12)), atol=1e-5, rtol=1e-5)


def test_says_so_where_nothing_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 9)
    with pytest.raises(LinAlgError, match=r"\(20, 12\)"):
        thin_svd(matrix((20, 12)))


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), RuntimeError("out of memory"), RuntimeError("no LAPACK")]
)
def test_other_errors_are_not_swallowed(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def svd(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(torch.linalg, "svd", svd)
    with pytest.raises(type(error), match=str(error)):
        thin_svd(matrix((4, 4)))
