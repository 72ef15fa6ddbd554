"""Evaluation as a recipe asks for it, under a progress bar."""

from __future__ import annotations

from makeweight.evals.perplexity import Perplexity, evaluate
from makeweight.recipe import Recipe
from makeweight.report import progress


def measure(recipe: Recipe, model: str, title: str) -> tuple[Perplexity, ...]:
    """Evaluate a folder on the data sets that a recipe names, under a progress bar."""
    wanted = recipe.eval
    if not wanted.datasets:
        return ()
    with progress.bar(title) as advance:
        results = evaluate(
            model,
            datasets=wanted.datasets,
            seqlen=wanted.seqlen,
            windows=wanted.windows,
            device=recipe.tune.device,
            trust_remote_code=recipe.trust_remote_code,
            progress=advance,
        )
    return tuple(results)
