"""Narrow numbers where a device has units for them, float32 elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from makeweight.job import Job
from makeweight.numerics import precision
from makeweight.numerics.precision import fast_dtype, named_dtype
from makeweight.pipeline import preflight
from tests.runs import small

CPU = torch.device("cpu")


@pytest.mark.usefixtures("known_rate")
@pytest.mark.parametrize(("units", "found"), [(True, torch.bfloat16), (False, torch.float32)])
def test_what_a_run_learns_in(
    units: bool, found: torch.dtype, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies", lambda *_: units)
    recipe = small(llama, tmp_path / "out", text)
    assert recipe.tune.dtype == "auto"
    assert Job.prepare(recipe).solver().context.dtype is found
    for name, named in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):  # what is named is not changed
        asked = replace(recipe, tune=replace(recipe.tune, dtype=name))
        assert Job.prepare(asked).solver().context.dtype is named


@pytest.mark.parametrize("units", [True, False])
def test_only_narrow_ones_change(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_multiplies", lambda *_: units)
    for wide in (torch.float32, torch.float64):
        assert fast_dtype(wide, CPU) is wide
    for narrow in (torch.bfloat16, torch.float16):
        assert fast_dtype(narrow, CPU) is (narrow if units else torch.float32)


def test_emulation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 without units for bfloat16 is enough for the library to take its products."""
    has_units = "_is_avx512_bf16_supported"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for units, found in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, has_units, lambda units=units: units, raising=False)
        assert named_dtype("auto", CPU) is found
    for units, found in ((True, torch.float16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda units=units: units, raising=False)
        assert fast_dtype(torch.float16, CPU) is found
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert named_dtype("auto", CPU) is torch.bfloat16, "of other processors the library knows"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, has_units)
    assert named_dtype("auto", CPU) is torch.bfloat16, "an older torch cannot be asked"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert named_dtype("auto", CPU) is torch.float32


@pytest.mark.usefixtures("known_rate")
def test_emulation_that_was_asked_for_is_named(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies", lambda *_: False)
    recipe = small(llama, tmp_path / "out", text)
    assert "emulates" not in preflight(recipe)
    asked = replace(recipe, tune=replace(recipe.tune, dtype="bfloat16"))
    assert preflight(asked).endswith("only emulates bfloat16: tune.dtype=auto is many times faster.")
