"""From "a+b+c" to steps by stage, every reason why a run cannot work, before any work, and what there is to choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from makeweight.calib.data import same_text
from makeweight.errors import UserError, did_you_mean
from makeweight.methods.base import BlockStep, FinetuneStep, GridStep, LossStep, MapStep, RoundStep, Step, TargetStep
from makeweight.methods.grid.clip import Rtn
from makeweight.methods.loss.cross_layer import Mse
from makeweight.methods.presets import COMPOSED, zoo
from makeweight.methods.weight.sde import Sde
from makeweight.recipe import Calib, Eval, Option, Recipe, Tune

if TYPE_CHECKING:
    from makeweight.models.checkpoint import Checkpoint

NO_EDGES = "it is not known which outputs of its blocks feed which inputs"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method string stands for, in order of execution."""

    names: tuple[str, ...]
    maps: tuple[MapStep, ...]
    grid: GridStep
    exact: tuple[BlockStep, ...] = ()
    loss: LossStep
    target: TargetStep | None = None
    rounding: RoundStep | None = None
    finetune: FinetuneStep | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps but the loss."""
        optional = (self.rounding, self.finetune)
        return (*self.exact, *self.maps, self.grid, *(step for step in optional if step is not None))

    @property
    def learns(self) -> bool:
        """Whether anything is learned, step by step."""
        return any(step.learns for step in self.steps)

    @property
    def calibrates(self) -> bool:
        """Whether calibration text and streams are needed."""
        return self.finetune is not None or any(step.learns or step.reads_inputs for step in self.steps)

    @property
    def weight_bytes(self) -> int:
        """Bytes per weight of what the steps learn block by block, where that is not small."""
        return sum(step.weight_bytes for step in self.steps if step is not self.finetune)

    @property
    def band(self) -> int | None:
        """The band that SDE learns, None without it; what its operations and its memory depend on."""
        return next((step.band for step in self.maps if isinstance(step, Sde)), None)


def compose(
    method: str, *, options: Mapping[str, Mapping[str, Option]] | None = None, rates: Mapping[str, float] | None = None
) -> Plan:
    """Read a method string such as "lwc+sde+cl", in any order of its parts.

    `options` replaces settings by method name, `rates` learning rates. Raises UserError for an unknown name or
    setting, a repeated part, and parts that cannot stand together.
    """
    known = zoo()
    names = parts_of(method)
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"method {method!r} names {min(repeated)} twice: name each part once.")
    changes: dict[str, dict[str, Any]] = {name: dict(given) for name, given in (options or {}).items()}
    for name, rate in (rates or {}).items():
        changes.setdefault(name, {})["rate"] = rate
    for name in changes:
        if name in COMPOSED and set(COMPOSED[name].parts) <= set(names):
            parts = ", ".join(COMPOSED[name].parts)
            raise UserError(f"a setting is given for {name!r}, which stands for {parts}: give it to one of these.")
        part, _, rest = name.partition(".")
        if part in names and hasattr(known[part].step, f"{rest}_rate"):
            raise UserError(f"{part} has one rate of its own, and {name!r} is another: use --set {name}_rate=VALUE.")
        if name not in names:
            raise UserError(
                f"a setting is given for {name!r}, which is not part of {method!r}: add it or leave it out."
            )
    steps = {name: _configured(name, known[name].step, changes.get(name, {})) for name in names}
    places = list(known)
    names.sort(key=lambda name: (known[name].stage, places.index(name)))
    return _plan(method, {name: steps[name] for name in names})


def parts_of(method: str) -> list[str]:
    """Return the methods that a method string stands for; raises UserError for an unknown one."""
    return [name for part in method.split("+") for name in expand(part.strip().lower())]


def expand(name: str) -> tuple[str, ...]:
    """Return the parts that a name stands for; raises UserError for an unknown one."""
    known = [*zoo(), *COMPOSED]
    if name not in known:
        raise UserError(f"method {name!r} is unknown{did_you_mean(name, known)}: choose among {', '.join(known)}.")
    return COMPOSED[name].parts if name in COMPOSED else (name,)


def _configured(name: str, step: Step, changes: Mapping[str, Any]) -> Step:
    known = {item.name: getattr(step, item.name) for item in fields(step)}
    for key, value in changes.items():
        if key not in known:
            raise UserError(
                f"{name} has no setting {key!r}{did_you_mean(key, known)}: it has {', '.join(known) or 'none'}."
            )
        kind = type(known[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{name}.{key}={value!r} is not possible: give {_like(known[key])}.")
        if (key == "rate" or key.endswith("_rate")) and value < 0:
            raise UserError(f"{name}.{key}={value!r} is not a rate: give a number that is not negative.")
    try:
        return replace(step, **changes)
    except UserError as error:  # a step does not know by which name it is asked for
        raise UserError(f"{name}: {error}") from error


def _like(known: Option) -> str:
    if isinstance(known, bool):
        return "true or false"
    return f"a value like {known!r}"


def _plan(method: str, steps: Mapping[str, Step]) -> Plan:
    grids = {name: step for name, step in steps.items() if isinstance(step, GridStep)}
    losses = {name: step for name, step in steps.items() if isinstance(step, LossStep)}
    roundings = {name: step for name, step in steps.items() if isinstance(step, RoundStep)}
    for kind, found in (("ways to the grid", grids), ("roundings", roundings), ("losses", losses)):
        if len(found) > 1:
            raise UserError(f"method {method!r} names {len(found)} {kind} ({', '.join(found)}): keep one of them.")
    for step in steps.values():
        others = tuple(other for other in steps.values() if other is not step)
        if (reason := step.conflicts(others)) is not None:
            raise UserError(f"method {method!r} cannot work: {reason}.")
    plan = Plan(
        names=tuple(steps),
        exact=tuple(step for step in steps.values() if isinstance(step, BlockStep)),
        maps=tuple(step for step in steps.values() if isinstance(step, MapStep)),
        grid=next(iter(grids.values()), Rtn()),
        loss=next(iter(losses.values()), Mse()),
        target=next((step for step in steps.values() if isinstance(step, TargetStep)), None),
        rounding=next(iter(roundings.values()), None),
        finetune=next((step for step in steps.values() if isinstance(step, FinetuneStep)), None),
    )
    judging = [name for name, step in steps.items() if isinstance(step, LossStep | TargetStep)]
    if judging and not plan.learns:
        raise UserError(
            f"method {method!r} learns nothing, so {min(judging)} has nothing to judge: add lwc or sde to it."
        )
    return plan


def chosen_blocks(recipe: Recipe, n_blocks: int) -> range:
    """Return which blocks are quantized; raises UserError for a range outside the model."""
    first, end = recipe.blocks or (0, n_blocks)
    if end > n_blocks:
        raise UserError(f"blocks {first}:{end} do not exist: {recipe.model} has blocks 0:{n_blocks}.")
    return range(first, end)


def check(plan: Plan, recipe: Recipe, ckpt: Checkpoint) -> range:
    """Refuse whatever cannot work with this model, in a sentence, and return the blocks to quantize."""
    blocks = chosen_blocks(recipe, ckpt.n_blocks)
    for name in plan.names:
        if zoo()[name].step.needs_edges and not ckpt.spec.edges:
            raise UserError(
                f"method {name!r} cannot be used with {ckpt.name}: {NO_EDGES}; use none of let, omniquant, scale, awq."
            )
        if reason := zoo()[name].step.misfit(recipe.scheme):
            raise UserError(f"method {name!r} cannot be used at {recipe.scheme}: {reason}.")
    _check_alike(ckpt)
    if plan.finetune is not None and in_pieces(plan, recipe).calib.samples < 2:
        raise UserError(
            f"nsamples={recipe.calib.nsamples} is too few for {recipe.method!r}, which is judged by samples that it "
            "does not learn from: give 2 or more."
        )
    for index in blocks:
        for name, (_, width) in ckpt.linear_shapes(index).items():
            recipe.scheme.group_of(width, f"{ckpt.block_module_path(index)}.{name}")
    limit = getattr(ckpt.config.get_text_config(), "max_position_embeddings", None)
    wanted = {
        "seqlen": (recipe if plan.finetune else in_pieces(plan, recipe)).calib.seqlen if plan.calibrates else 0,
        "eval seqlen": recipe.eval.seqlen if recipe.eval.datasets else 0,
    }
    for name, length in wanted.items():
        if isinstance(limit, int) and length > limit:
            raise UserError(
                f"{name} {length} is longer than the {limit} positions of {ckpt.name}: give {limit} or less."
            )
    return blocks


def in_pieces(plan: Plan, recipe: Recipe) -> Recipe:
    """Return a recipe as blocks see it: samples are pieces of those drawn, and a step takes as many more of them.

    Where blocks learn nothing it stays: what solves in one go sees whole samples, as the whole network does.
    """
    count, calib = recipe.calib.pieces, recipe.calib
    if count == 1 or not plan.learns:
        return recipe
    cut = replace(calib, nsamples=calib.nsamples * count, written=calib.written * count, seqlen=calib.seqlen // count)
    return replace(recipe, calib=cut, tune=replace(recipe.tune, batch_size=recipe.tune.batch_size * count))


def unused(recipe: Recipe) -> list[str]:
    """Return the options that a recipe sets and that change nothing in what it runs."""
    plan = compose(recipe.method, options=recipe.options)
    in_blocks = any(step.learns or step.reads_inputs for step in plan.steps)
    used = {
        "--dataset": plan.calibrates or recipe.calib.dataset == Calib.dataset,
        "--nsamples": plan.calibrates or recipe.calib.nsamples == Calib.nsamples,
        "--seqlen": plan.calibrates or recipe.calib.seqlen == Calib.seqlen,
        "--written": plan.calibrates or not recipe.calib.written,
        "--batch-size": in_blocks or recipe.tune.batch_size == Tune.batch_size,
        "--piece": plan.learns or recipe.calib.piece == Calib.piece,
        "--steps": plan.learns or recipe.tune.steps == Tune.steps,
        "--eval-seqlen": bool(recipe.eval.datasets) or recipe.eval.seqlen == Eval.seqlen,
        "--eval-windows": bool(recipe.eval.datasets) or recipe.eval.windows is None,
    }
    return [option for option, counts in used.items() if not counts]


def seen(recipe: Recipe) -> list[str]:
    """Return the texts that a recipe measures on though it has calibrated on them."""
    calibrates = compose(recipe.method).calibrates
    return [name for name in recipe.eval.datasets if calibrates and same_text(recipe.calib.dataset, name)]


def _check_alike(ckpt: Checkpoint) -> None:
    """Refuse a model whose blocks hold different linears: shards, configuration and streams count on the first's."""
    first = set(ckpt.linear_shapes(0))
    for index in range(1, ckpt.n_blocks):
        if other := sorted(first ^ set(ckpt.linear_shapes(index))):
            raise UserError(
                f"{ckpt.name} cannot be quantized: its blocks differ, {other[0]} is in one of blocks 0 and {index} "
                "only; use a model whose blocks hold the same linears."
            )


def zoo_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: every method with its stage, what it does and where it is from."""
    rows = [(name, method.stage.name.lower(), method.summary, method.source) for name, method in zoo().items()]
    rows += [(name, "", "+".join(composed.parts), composed.source) for name, composed in COMPOSED.items()]
    return ("method", "stage", "what it does", "source"), rows


def settings(method: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: what can be set of the parts of a method, and what it is where nothing is said."""
    steps = {name: zoo()[name].step for name in parts_of(method)}
    found = [(f"{name}.{item.name}", getattr(step, item.name)) for name, step in steps.items() for item in fields(step)]
    return ("--set", "default"), [(name, str(value).lower()) for name, value in found]


def fits(description: Mapping[str, Any]) -> dict[str, str | None]:
    """Return for every method why a described model cannot use it, or None where it can."""
    return {
        name: NO_EDGES if method.step.needs_edges and not description["edges"] else None
        for name, method in zoo().items()
    }
