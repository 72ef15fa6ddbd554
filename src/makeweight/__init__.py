"""Quantize large language models to 2-8 bits, with errors that compensate each other.

Names are loaded on first use: `import makeweight` must not cost the seconds that torch takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from makeweight.effort import with_effort
    from makeweight.evals.perplexity import evaluate
    from makeweight.export.run import export_model
    from makeweight.numerics.scheme import Scheme
    from makeweight.pipeline import quantize
    from makeweight.recipe import Calib, Eval, Recipe, Tune

__version__ = "0.1.0"
__all__ = [
    "Calib",
    "Eval",
    "Recipe",
    "Scheme",
    "Tune",
    "__version__",
    "evaluate",
    "export_model",
    "quantize",
    "with_effort",
]

_HOMES = {
    "Calib": "makeweight.recipe",
    "Eval": "makeweight.recipe",
    "Recipe": "makeweight.recipe",
    "Scheme": "makeweight.numerics.scheme",
    "Tune": "makeweight.recipe",
    "evaluate": "makeweight.evals.perplexity",
    "export_model": "makeweight.export.run",
    "quantize": "makeweight.pipeline",
    "with_effort": "makeweight.effort",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
