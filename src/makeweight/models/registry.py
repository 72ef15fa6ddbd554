"""Finds the spec of a configuration: every module of this package with `SPECS` is a family."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from makeweight import models
from makeweight.errors import UserError, first_line
from makeweight.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@cache
def all_specs() -> tuple[ModelSpec, ...]:
    """Return every family's specs; adding a family is adding a file to this folder."""
    names = sorted(info.name for info in pkgutil.iter_modules(models.__path__))
    modules = [importlib.import_module(f"{models.__name__}.{name}") for name in names]
    return tuple(spec for module in modules for spec in getattr(module, "SPECS", ()))


def spec_for(config: PretrainedConfig, model: PreTrainedModel | None = None) -> ModelSpec:
    """Return the first spec that accepts the configuration, and else the generic one of its model.

    `model` (of any device, also meta) spares building one for the generic spec. Raises `UserError` where the
    configuration has no causal language model or its blocks hold no `nn.Linear`.
    """
    architecture = model_class(config).__name__ if model is None else type(model).__name__
    for spec in all_specs():
        if spec.accepts(architecture, config):
            return spec
    return generic_spec(empty_model(config) if model is None else model)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the transformers class of a configuration's causal language model, or refuse in a sentence."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    mapping = AutoModelForCausalLM._model_mapping  # the only table of causal classes that transformers has
    stored = getattr(config, "architectures", None) or []
    if not isinstance(stored, list) or not all(isinstance(item, str) for item in stored):
        raise UserError(f"config.json has architectures {stored!r}, which is not a list of names: download it again.")
    found = mapping.get(type(config), None)
    cls = found[0] if isinstance(found, tuple) else found
    name = stored[0] if stored else type(config).__name__
    # These attend both ways unless they are told that they are decoders.
    encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", True)
    if cls is None or encoder or (stored and cls.__name__.casefold() not in {item.casefold() for item in stored}):
        raise UserError(
            f"{name} is not a causal language model: give a decoder such as LLaMA, Qwen, Gemma, OPT or Phi."
        )
    if config.get_text_config() is not config:
        raise UserError(f"{name} reads more than text: give the text-only version of the model.")
    return cls


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal model of a configuration with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    cls = None if trust_remote_code and hasattr(config, "auto_map") else model_class(config)
    # transformers 5.18 and earlier offer "sdpa" for Gemma 2 as well, and it leaves the cap out without a word.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    sdpa = bool(getattr(cls, "_supports_sdpa", False)) and not capped
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=config.dtype,
                attn_implementation="sdpa" if sdpa else "eager",
                trust_remote_code=trust_remote_code,
            )
    # Whatever a model's own code makes of numbers that do not fit together.
    except Exception as error:
        raise UserError(
            f"config.json describes a {config.model_type} that transformers cannot build ({first_line(error)}): "
            "use the one that belongs to the weights."
        ) from error
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def generic_spec(model: PreTrainedModel) -> ModelSpec:
    """Describe any causal model by its longest list of equal modules; it has no edges.

    Raises `UserError` where there is no such list, or its modules hold no `nn.Linear` or keep experts in
    tensors of three dimensions.
    """
    name = type(model).__name__
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    }
    if not lists:
        raise UserError(f"{name} has no list of equal blocks: give a decoder such as LLaMA, Qwen, Gemma, OPT or Phi.")
    blocks = max(lists, key=lambda path: len(lists[path]))
    if not any(isinstance(module, nn.Linear) for module in lists[blocks][0].modules()):
        kinds = sorted({type(module).__name__ for module in lists[blocks][0].modules() if not list(module.children())})
        raise UserError(
            f"{name} has no nn.Linear in its blocks (they hold {', '.join(kinds)}): "
            "give a decoder such as LLaMA, Qwen, Gemma, OPT or Phi."
        )
    wide = [path for block in lists[blocks] for path, item in block.named_parameters() if item.ndim > 2]
    if wide:
        kind = "a mixture of experts" if "conv" not in wide[0] else "a convolution"
        raise UserError(
            f"{name} keeps {wide[0]} of a block in one tensor of more than two dimensions ({kind}): "
            "give a model whose blocks hold plain linear layers."
        )
    _check_most_is_linear(name, lists[blocks][0])
    paths = {id(module): path for path, module in model.named_modules()}
    return ModelSpec(
        family="generic",
        architectures=(name,),
        blocks=blocks,
        embedding=paths[id(model.get_input_embeddings())],
        final_norm=None,
        head=paths.get(id(model.get_output_embeddings())),
        notes="No edges are known: methods that rescale or rotate across layers do not apply.",
    )


def _check_most_is_linear(name: str, block: nn.Module) -> None:
    """Refuse a block whose matrices are mostly no linears': what is quantized would be the smaller part of it."""
    linear = {id(item) for module in block.modules() if isinstance(module, nn.Linear) for item in module.parameters()}
    other = {path: item for path, item in block.named_parameters() if item.ndim > 1 and id(item) not in linear}
    if sum(item.numel() for item in other.values()) > sum(p.numel() for p in block.parameters() if id(p) in linear):
        raise UserError(
            f"{name} keeps most weights of a block outside of linear layers ({next(iter(other))}, a mixture of experts "
            "as a rule): give a model whose blocks hold plain linear layers."
        )
