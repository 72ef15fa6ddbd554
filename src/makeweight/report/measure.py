"""Evaluation as a recipe asks for it, under a progress bar."""

from __future__ import annotations

from makeweight.evals.perplexity import Perplexity, Texts, compare
from makeweight.recipe import Recipe
from makeweight.report import progress


def measure(recipe: Recipe, model: str, original: str) -> tuple[tuple[Perplexity, ...], tuple[Perplexity, ...]]:
    """Evaluate a folder on the texts that a recipe names, and what it was made of where the recipe asks for that."""
    wanted = recipe.eval
    if not wanted.datasets:
        return (), ()
    texts = Texts(
        datasets=wanted.datasets,
        seqlen=wanted.seqlen,
        windows=wanted.windows,
        device=recipe.tune.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    if not wanted.baseline:
        with progress.bar("evaluating the result") as advance:
            return tuple(texts.results(*texts.read(texts.open(model), advance))), ()
    with progress.bar("evaluating the original and the result") as advance:
        results, baselines = compare(model, original, texts, advance)
    return tuple(results), tuple(baselines)
