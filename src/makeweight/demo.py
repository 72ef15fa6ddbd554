"""The demonstration: a real small model to 3 bits, against round-to-nearest, on texts that are on every machine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from makeweight.models.gguf import demo_model
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Calib, Eval, Recipe, Tune
from makeweight.report.tables import compare

METHODS = ("rtn", "lwc+sde+cl")


def demo(out: Path) -> None:
    """Quantize SmolLM2-135M-Instruct to W3A16g64 into `out`, one folder per method, and print what each lost."""
    base = Recipe(
        model=str(demo_model()),
        out=str(out),
        scheme=Scheme(bits=3, group_size=64),
        calib=Calib(dataset="python-docs", nsamples=32, seqlen=256),
        tune=Tune(steps=14, batch_size=2, checks=2),
        eval=Eval(windows=2, baseline=False),
    )
    print(
        "SmolLM2-135M-Instruct, from a Q4_1 file, to 3 bits, calibrated on the Python language reference.",
        file=sys.stderr,
    )
    records = []
    for method in METHODS:
        last = method == METHODS[-1]
        recipe = replace(base, method=method, out=str(out / method), eval=replace(base.eval, baseline=last))
        records.append(quantize(recipe))
    compare(records)
    path = records[-1].path
    print(f"Written to {path}: load it with transformers' from_pretrained, or measure it with `makeweight evaluate`.")
