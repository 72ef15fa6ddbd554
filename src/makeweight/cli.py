"""The command line: every option sets a field of a `Recipe`, and every wrong input ends with one sentence and code 2.

Torch, transformers and the engine are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from makeweight import __version__, options
from makeweight.errors import UserError, out_of_memory
from makeweight.numerics.scheme import Scheme
from makeweight.paths import expanded
from makeweight.recipe import Recipe, parse_blocks

Formats = Annotated[
    list[str] | None, typer.Option("--format", metavar="NAME,..", help="Write these too; `export` lists them.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME.OPTION=VALUE", help="See `methods NAME`.")]
Trust = Annotated[bool | None, typer.Option("--trust-remote-code", help="Run the model's own code.")]
app = typer.Typer(
    help="Quantize large language models to 2-8 bits after training.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130
TEXT = "python-docs"
MORE_MEMORY = "memory ran out: give the same command where more is free"
LESS_WORK = ", and it goes on, or begin anew with a smaller --batch-size, --nsamples or --seqlen and another --out"
DEMO = Path("smollm2-w3")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what a user can mend, 130 when interrupted."""
    words = normalize(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        # Typer turns Ctrl-C into an exit code of its own, and returns it only here.
        code = typer.main.get_command(app).main(words, prog_name="makeweight", standalone_mode=False)
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        place = error.filename or "the system"
        return _refuse(f"{place} gives an error ({error.strerror or error}): check path, permissions and free space.")
    except typer.TyperException as error:
        return _refuse(options.misread(error, words))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _refuse(f"{MORE_MEMORY}{LESS_WORK if words[0] == 'quantize' else ''}.")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        resumes = "; the same command resumes after the last finished block" if words[0] in ("quantize", "demo") else ""
        print(f"makeweight: stopped{resumes}.", file=sys.stderr)
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
    effort: Annotated[str | None, typer.Option(help="light, default or best: a method and its steps.")] = None,
    method: Annotated[str | None, typer.Option(help="Methods joined by +, in place of an effort.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, 2 to 8 [4].")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs per scale, -1: per channel [128].")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric grid [asym].")] = None,
    scheme: Annotated[str | None, typer.Option(help="These three in one: W3A16g64; without g, per channel.")] = None,
    scale_dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Quantize these blocks only, as in 0:8.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration text [pile-10k].")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration samples [128].")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per sample [2048].")] = None,
    written: Annotated[int | None, typer.Option(help="More samples that the model writes itself [0].")] = None,
    piece: Annotated[int | None, typer.Option(help="Tokens of a sample that a block learns on at once [256].")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--iters", help="Per block [240].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step [2].")] = None,
    lr: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A method's rate, as sde=1e-3.")] = None,
    option: Settings = None,
    eval_dataset: Annotated[list[str] | None, typer.Option(metavar="NAME", help="To evaluate on; repeat it.")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not evaluate.")] = False,
    eval_windows: Annotated[int | None, typer.Option(help="Evaluate on the first windows only.")] = None,
    eval_seqlen: Annotated[int | None, typer.Option(help="Tokens per window of evaluation [2048].")] = None,
    out: Annotated[str | None, typer.Option("--out", "--output-dir", help="Folder to write [MODEL-SCHEME].")] = None,
    formats: Formats = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling and training [0].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Start from a saved recipe; options given here win.")] = None,
    trust_remote_code: Trust = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate, then stop.")] = False,
) -> None:
    """Quantize a model; the same command resumes."""
    text = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "written": written, "piece": piece}
    saved = Recipe.load(recipe, model=model, out=out) if recipe else None
    grid = options.grid(saved.scheme if saved else Scheme(), scheme, bits, group_size, sym, scale_dtype)
    base = options.by_method(options.at_effort(saved or options.start(model, out, grid), effort, method), method)
    rates, texts = options.rates(base, lr, option), options.evaluated(eval_dataset, no_eval=no_eval)
    wanted = options.changed(
        base,
        model=model,
        scheme=grid,
        blocks=parse_blocks(blocks) if blocks is not None else None,
        calib=options.changed(base.calib, **text),
        tune=options.changed(base.tune, steps=steps, batch_size=batch_size, device=device, rates=rates),
        eval=options.evaluation(base.eval, texts, eval_windows, eval_seqlen),
        out=out,
        seed=seed,
        options=options.settings(base, option),
        formats=options.words(formats),
        trust_remote_code=trust_remote_code,
    )
    _run(wanted, dry=dry_run)


def _run(wanted: Recipe, *, dry: bool) -> None:
    from makeweight.pipeline import preflight, quantize
    from makeweight.report.tables import show

    if dry:
        print(preflight(wanted))
    else:
        show(quantize(wanted))
    options.remark(wanted)  # last: what is refused gets one sentence


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Folder that `quantize` wrote.")],
    formats: Formats = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--output-dir", help="Folder for one folder per format [beside PATH].")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload; several: NAME-FORMAT.")] = None,
) -> None:
    """Write other formats; without --format, say which fit."""
    from makeweight.export.hub import push
    from makeweight.export.run import can_export
    from makeweight.export.run import export_model as run
    from makeweight.export.solved import Solved

    wanted = options.words(formats)
    if push_to_hub is not None and not push_to_hub.strip():
        raise UserError("--push-to-hub names no repository: write it like USER/NAME.")
    if not wanted:
        if out is not None or push_to_hub is not None:
            raise UserError("--out and --push-to-hub need to know what to write: name it with --format.")
        answers = can_export(Solved(path))
        _print_table(("format", f"holds {path.name}", "loads in"), [answer.words() for answer in answers])
        return
    done = run(path, wanted, out=out)
    columns = ("format", "MB", "linears", "other tensors", "furthest weight")
    rows = [(e.format, f"{e.bytes / 1e6:.1f}", str(e.linears), str(e.kept), _steps(e.deviation)) for e in done]
    _print_table(columns, rows)
    for item in done:
        print(f"Written to {item.path}")
    if push_to_hub:
        for item in done:
            print(push(item.path, push_to_hub if len(done) == 1 else f"{push_to_hub}-{item.format}"))


def _steps(deviation: float) -> str:
    return f"{deviation:.1g} steps off" if deviation else "equal"


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="Folder that makeweight wrote.")]) -> None:
    """Find out whether a written folder is undamaged."""
    from makeweight.export.manifest import check
    from makeweight.export.solved import REPAIR

    if problems := check(expanded(path)):
        raise UserError(f"{path} is not what was written: {' '.join(problems)} {REPAIR}")
    print(f"{path} is what was written, byte for byte.")


@app.command()
def evaluate(
    path: Annotated[str, typer.Argument(help="Folder, hub name or GGUF file.")],
    dataset: Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"Text; repeat for more [{TEXT}].")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 2048,
    windows: Annotated[int | None, typer.Option(help="The first windows only [all].", min=1)] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Say how far predictions are from this model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Measure the perplexity of a model on texts, and with --against what is left of its original."""
    from makeweight.evals.perplexity import Texts, compare
    from makeweight.evals.perplexity import evaluate as measure
    from makeweight.report import progress
    from makeweight.report.tables import evaluated

    wanted = {
        "datasets": tuple(dataset) if dataset else (TEXT,),
        "seqlen": seqlen,
        "windows": windows,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    with progress.bar("evaluating") as tick:
        results, originals = (
            compare(path, against, Texts(**wanted), tick)
            if against is not None
            else (measure(path, **wanted, progress=tick), ())
        )
    _print_table(*evaluated(results, originals))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder, hub name or GGUF file.")],
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Show what a model is made of, and which methods fit it."""
    from makeweight.models.inspect import describe
    from makeweight.models.load import open_checkpoint
    from makeweight.plan import fits
    from makeweight.report.tables import is_table, words

    description = describe(open_checkpoint(path, trust_remote_code=trust_remote_code))
    tables = {name: value for name, value in description.items() if is_table(value)}
    _print_table(("model", ""), [(name, words(value)) for name, value in description.items() if name not in tables])
    for name, rows in tables.items():
        _print_table(list(rows[0]), [[words(cell) for cell in row.values()] for row in rows], title=name)
    verdicts = [(name, "fits" if reason is None else reason) for name, reason in fits(description).items()]
    _print_table(("method", ""), verdicts)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Methods joined by +: list what can be set of them.")] = None,
) -> None:
    """List every method with its stage and its source, or what can be set of some."""
    from makeweight.plan import settings, zoo_table

    _print_table(*(zoo_table() if name is None else settings(name)))


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", "--output-dir", help="Folder to write.")] = DEMO) -> None:
    """Quantize SmolLM2-135M to 3 bits and compare."""
    from makeweight.demo import demo as run

    run(out)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; cells are plain text, in which brackets mean nothing."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
