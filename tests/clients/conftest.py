"""One solved copy of the real small model per scheme, by round-to-nearest: seconds each, and the codes are codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from makeweight.export.run import export_model
from makeweight.models.gguf import demo_model
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe

Exporter = Callable[[str, str], Path]
Tell = Callable[[str], None]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Return a function that prints a measured figure whether or not the test fails."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return say


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Return a function from scheme and format to a folder of SmolLM2-135M-Instruct, solved and written once."""
    root = tmp_path_factory.mktemp("clients")

    def write(scheme: str, form: str) -> Path:
        solved, target = root / scheme / "solved", root / scheme / form
        if not solved.is_dir():
            recipe = Recipe(
                model=str(demo_model()),
                out=str(solved),
                method="rtn",
                scheme=Scheme.parse(scheme),
                eval=Eval(datasets=()),
            )
            quantize(recipe)
        if not target.is_dir():
            export_model(solved, [form], out=root / scheme)
        return target

    return write
