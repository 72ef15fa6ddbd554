"""Runs where hqq is installed: its search for scales and zero-points, saved as dequantized weights; no calibration.

    python hqq_script.py JOB.json

Groups run along the inputs (axis 1), as everywhere else here. Zero-points are floats in any case: a search moves them
after they have been rounded. Scales and zero-points are float16, the library's own default.
"""

from __future__ import annotations

from typing import Any

import handover
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from transformers import AutoModelForCausalLM


def quantize(job: dict[str, Any]) -> None:
    """Write the folder OUT/dense: what each `HQQLinear` dequantizes to, in the dtype that the model has."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    group_size = None if job["group_size"] == -1 else job["group_size"]
    config = BaseQuantizeConfig(nbits=job["bits"], group_size=group_size, axis=1, **job["options"])
    for linear in [module for module in model.model.modules() if isinstance(module, nn.Linear)]:
        quantized = HQQLinear(linear, config, del_orig=False, compute_dtype=torch.float16, device="cpu")
        linear.weight.data = quantized.dequantize().to(linear.weight.dtype)
    handover.save(model, job)


def main() -> None:
    """Quantize, and say with what."""
    job = handover.read_job()
    quantize(job)
    handover.answer(job, "hqq")


if __name__ == "__main__":
    main()
