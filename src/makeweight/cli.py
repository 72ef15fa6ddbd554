"""The command line: every option sets a field of a `Recipe`, and every wrong input ends with one sentence and code 2.

Torch, transformers and the engine are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from makeweight import __version__
from makeweight.errors import UserError
from makeweight.numerics.scheme import Scheme
from makeweight.recipe import Option, Recipe, parse_blocks, parse_option, parse_rate

T = TypeVar("T")
app = typer.Typer(
    help="Quantize large language models to 2-8 bits after training.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130
TEXT = "python-docs"
DEMO = Path("smollm2-w3")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    words = normalize(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        # Typer turns Ctrl-C into an exit code of its own, and returns it only here.
        code = typer.main.get_command(app).main(words, prog_name="makeweight", standalone_mode=False)
    except UserError as error:
        return _refuse(str(error))
    except typer.TyperException as error:
        return _refuse(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("makeweight: stopped; the same command resumes after the last finished block.", file=sys.stderr)
    return code if isinstance(code, int) else 0


def normalize(words: Sequence[str]) -> list[str]:
    """Write `--group_size` as `--group-size`, in names of options only: values are left alone."""
    out: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return out + list(words[place:])
        name, equals, value = word.partition("=")
        out.append(name.replace("_", "-") + equals + value if re.fullmatch(r"--[a-z][\w-]*", name) else word)
    return out


def _refuse(sentence: str) -> int:
    print(f"makeweight: {sentence}", file=sys.stderr)
    return 2


def _version(asked: bool) -> None:
    if asked:
        print(f"makeweight {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def quantize(
    model: Annotated[str | None, typer.Option(help="Hugging Face folder, hub name or GGUF file.")] = None,
    method: Annotated[str | None, typer.Option(help="Methods joined by + [lwc+sde+cl].")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, 2 to 8 [4].")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs per scale, -1: per channel [128].")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric grid [asym].")] = None,
    scheme: Annotated[str | None, typer.Option(help="Shorthand for these three, as in W3A16g64.")] = None,
    scale_dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Quantize these blocks only, as in 0:8.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration text [pile-10k].")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration samples [128].")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per sample [2048].")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--iters", help="Per block [200].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step [4].")] = None,
    lr: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A method's learning rate.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="As sde.band=8.")
    ] = None,
    eval_dataset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Text to evaluate on; repeat for more.")
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Evaluate on the first windows only.")] = None,
    eval_seqlen: Annotated[int | None, typer.Option(help="Tokens per window of evaluation [2048].")] = None,
    out: Annotated[str | None, typer.Option("--out", "--output-dir", help="Folder to write.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling and training [0].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Start from a saved recipe; options given here win.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate, then stop.")] = False,
) -> None:
    """Quantize a model; the same command resumes."""
    saved = Recipe.load(recipe) if recipe else None
    grid = _scheme(saved.scheme if saved else Scheme(), scheme, bits, group_size, sym, scale_dtype)
    base = saved or _start(model, out, grid)
    wanted = _with(
        base,
        model=model,
        method=method,
        scheme=grid,
        blocks=parse_blocks(blocks) if blocks is not None else None,
        calib=_with(base.calib, dataset=dataset, nsamples=nsamples, seqlen=seqlen),
        tune=_with(base.tune, steps=steps, batch_size=batch_size, device=device, rates=_rates(base, lr)),
        eval=_with(base.eval, datasets=_names(eval_dataset), windows=eval_windows, seqlen=eval_seqlen),
        out=out,
        seed=seed,
        options=_options(base, option),
        trust_remote_code=trust_remote_code,
    )
    from makeweight.pipeline import preflight
    from makeweight.pipeline import quantize as run
    from makeweight.report.tables import show

    if dry_run:
        print(preflight(wanted))
    else:
        show(run(wanted))


@app.command()
def evaluate(
    path: Annotated[str, typer.Argument(help="Folder, hub name or GGUF file.")],
    dataset: Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"Text; repeat for more [{TEXT}].")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 2048,
    windows: Annotated[int | None, typer.Option(help="The first windows only [all].", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Measure the perplexity of a model on texts."""
    from makeweight.evals.perplexity import evaluate as measure

    names = tuple(dataset) if dataset else (TEXT,)
    results = measure(
        path,
        datasets=names,
        seqlen=seqlen,
        windows=windows,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    rows = [(r.dataset, f"{r.perplexity:.3f}", str(r.windows), str(r.tokens), f"{r.seconds:.1f}") for r in results]
    _print_table(("dataset", "perplexity", "windows", "tokens", "seconds"), rows)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder, hub name or GGUF file.")],
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Show what a model is made of, and which methods fit it."""
    from makeweight.models.inspect import describe
    from makeweight.models.load import open_checkpoint
    from makeweight.plan import fits

    description = describe(open_checkpoint(path, trust_remote_code=trust_remote_code))
    tables = {name: value for name, value in description.items() if _is_table(value)}
    _print_table(("model", ""), [(name, _words(value)) for name, value in description.items() if name not in tables])
    for name, rows in tables.items():
        _print_table(list(rows[0]), [[_words(cell) for cell in row.values()] for row in rows], title=name)
    verdicts = [(name, "fits" if reason is None else reason) for name, reason in fits(description).items()]
    _print_table(("method", ""), verdicts)


@app.command()
def methods() -> None:
    """List every method with its stage and its source."""
    from makeweight.methods.presets import zoo

    rows = [(name, method.stage.name.lower(), method.summary, method.source) for name, method in zoo().items()]
    _print_table(("method", "stage", "what it does", "source"), rows)


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", "--output-dir", help="Folder to write.")] = DEMO) -> None:
    """Quantize SmolLM2-135M to 3 bits and compare."""
    from makeweight.demo import demo as run

    run(out)


def _start(model: str | None, out: str | None, scheme: Scheme) -> Recipe:
    """Begin a recipe from the command line alone; without --out the folder is named after model and scheme."""
    if model is None:
        raise UserError("--model is missing: name a Hugging Face folder, a hub name or a GGUF file.")
    name = Path(model.rstrip("/")).name.removesuffix(".gguf") or "model"
    return Recipe(model=model, out=out or f"{name}-{scheme}".lower())


def _with(base: T, **changes: Any) -> T:
    """Replace what was given on the command line and keep the rest."""
    return replace(base, **{name: value for name, value in changes.items() if value is not None})  # pyright: ignore[reportReturnType, reportArgumentType]


def _scheme(
    base: Scheme, text: str | None, bits: int | None, group_size: int | None, sym: bool | None, dtype: str | None
) -> Scheme:
    changes: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": sym, "scale_dtype": dtype}
    if text is None:
        return _with(base, **changes)
    named = _with(Scheme.parse(text, scale_dtype=base.scale_dtype), scale_dtype=dtype)
    flags = {
        "bits": f"--bits {bits}",
        "group_size": f"--group-size {group_size}",
        "symmetric": "--sym" if sym else "--asym",
    }
    for name, flag in flags.items():
        if changes[name] is not None and changes[name] != getattr(named, name):
            raise UserError(f"--scheme {text} means {_long(named)}, and {flag} says otherwise: give one of the two.")
    return named


def _long(scheme: Scheme) -> str:
    group = "one scale per channel" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    return f"{scheme.bits} bits, {group}, {'symmetric' if scheme.symmetric else 'asymmetric'}"


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(given) if given else None


def _rates(base: Recipe, given: list[str] | None) -> dict[str, float] | None:
    return {**base.tune.rates, **dict(map(parse_rate, given))} if given else None


def _options(base: Recipe, given: list[str] | None) -> dict[str, dict[str, Option]] | None:
    if not given:
        return None
    options = {method: dict(values) for method, values in base.options.items()}
    for method, name, value in map(parse_option, given):
        options.setdefault(method, {})[name] = value
    return options


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _words(value: object) -> str:
    """Write a value of a description for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; cells are plain text, in which brackets mean nothing."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
