"""Which processor this machine has: times of one are no match for another's, even where products are as fast."""

from __future__ import annotations

from pathlib import Path

UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""What matrices may be multiplied with, the best first, as Linux calls it."""


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor by its family and model and by the best of its UNITS; empty where Linux does not say."""
    try:
        lines = info.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return ""
    units = next((unit for unit in UNITS if unit in facts.get("flags", "").split()), "no unit known")
    return f"{facts['model name']} ({facts.get('cpu family', '-')}/{facts.get('model', '-')}, {units})"
