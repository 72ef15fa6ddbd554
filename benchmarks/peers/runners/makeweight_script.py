"""Runs where makeweight is installed: one of our own runs, exported as dense weights.

    python makeweight_script.py JOB.json

The options are any part of a recipe in its JSON form; the samples are drawn from the text as for everybody else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import handover

from makeweight import Recipe, quantize
from makeweight.export.run import export_model


def recipe(job: dict[str, Any]) -> Recipe:
    """Return the recipe: the job's options, and what all runs share."""
    options = dict(job["options"])
    shared = {
        "model": job["model"],
        "out": str(Path(job["out"]) / "solved"),
        "scheme": {"bits": job["bits"], "group_size": job["group_size"]},
        "calib": {
            **options.pop("calib", {}),
            "dataset": job["text"],
            "nsamples": job["nsamples"],
            "seqlen": job["seqlen"],
        },
        "tune": {"device": "cpu", **options.pop("tune", {})},
        "eval": {"datasets": []},
        "seed": job["seed"],
    }
    return Recipe.from_json(json.dumps({**options, **shared}))


def main() -> None:
    """Quantize into OUT/solved, write OUT/dense, and say with what."""
    job = handover.read_job()
    record = quantize(recipe(job))
    export_model(record.path, ["dense"], out=job["out"])
    handover.answer(job, "makeweight", digest=record.digest)


if __name__ == "__main__":
    main()
