"""Read what transformers models say about themselves, and patch the methods that adapted ones need patched.

Their classes are recognised by name, so that transformers is not imported.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

from torch import nn

from ..distributed.flat import own_weight
from ..names import derives_from, parent_names
from ..nn.adapted_module import AdaptedModule, NamedModules
from ..nn.gradient_checkpointing import enable_input_require_grads
from .patches import call_previous, patch

SET_CHECKPOINTING = "_set_gradient_checkpointing"  # called by both of transformers' public methods for checkpointing
CONVERSIONS = "_weight_conversions"  # of a transformers 5 model: the conversions of its tensors at loading
QUANTIZATION_CONFIG = "quantization_config"  # attribute of a model's config
QUANTIZATION = {  # attributes that transformers sets on a model that it has quantized
    *("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"),
    *("is_4bit_serializable", "is_8bit_serializable"),
}


def pretrained_models(modules: NamedModules) -> dict[str, nn.Module]:
    """Return the outermost transformers models in a model, which may be the model itself, by name.

    Args:
        modules: every module of the model under its first name, the model first.
    """
    of_transformers = _classes_of_transformers(module for _, module in modules)
    found: dict[str, nn.Module] = {}
    for name, module in modules if of_transformers else ():
        if type(module) in of_transformers and found.keys().isdisjoint(("", name, *parent_names(name))):
            found[name] = module
    return found


def _classes_of_transformers(modules: Iterable[nn.Module]) -> set[type[nn.Module]]:
    """Return the classes of transformers' PreTrainedModels among modules. A model has few classes and many modules."""
    return {cls for cls, module in {type(module): module for module in modules}.items() if is_pretrained_model(module)}


def is_pretrained_model(module: nn.Module) -> bool:
    """Return whether a module is a transformers PreTrainedModel."""
    return derives_from(module, "PreTrainedModel", ("transformers",))


def base_name(modules: NamedModules) -> str:
    """Return the path or name of a model's only transformers model with adapted layers, or "" for none or several."""
    pretrained = pretrained_models(modules).values()
    names = {checkpoint_name(each) for each in pretrained if is_adapted(each)}
    return names.pop() if len(names) == 1 else ""


def checkpoint_name(pretrained: nn.Module) -> str:
    """Return the path or name that a transformers model was loaded from, or "" where it was built from a config."""
    name = getattr(pretrained, "name_or_path", None)
    return name if isinstance(name, str) else ""


def resized_embeddings(modules: NamedModules) -> list[nn.Parameter]:
    """Return embeddings and output heads that have another number of rows than in their checkpoint.

    By PEFT's rule they do where config.vocab_size differs from the checkpoint's own config. That config is read from
    disk; nothing is downloaded.
    """
    found: list[nn.Parameter] = []
    for pretrained in pretrained_models(modules).values():
        config: Any = getattr(pretrained, "config", None)
        rows = getattr(config, "vocab_size", None)
        name = checkpoint_name(pretrained)
        if not name or rows is None:
            continue
        revision = getattr(config, "_commit_hash", None)
        try:
            on_disk: Any = type(config).from_pretrained(name, revision=revision, local_files_only=True)
        except (OSError, ValueError):  # the checkpoint is not on this disk
            continue
        if rows != getattr(on_disk, "vocab_size", None):
            found += embeddings(pretrained)
    return found


def input_embeddings(pretrained: nn.Module) -> nn.Module | None:
    """Return a transformers model's input embeddings, or None where get_input_embeddings is not implemented."""
    try:
        return cast("nn.Module | None", cast(Any, pretrained).get_input_embeddings())
    except NotImplementedError:
        return None


def tied_to_input(modules: NamedModules, prefix: str) -> dict[str, str]:
    """Return the name of the input embeddings for each module that shares their weight, by the module's name.

    Args:
        modules: every module of a model under its first name, the model first.
        prefix: the name of the transformers model in the model, ending in a dot, or "" for the model itself.
    """
    pretrained = pretrained_models(modules).get(prefix.removesuffix("."))
    table = input_embeddings(pretrained) if pretrained is not None else None
    # An image model's input embeddings may be a block without a weight.
    weight = own_weight(table) if table is not None else None
    if weight is None or not getattr(getattr(pretrained, "config", None), "tie_word_embeddings", False):
        return {}
    names = {name: module for name, module in modules if name}
    first = next(name for name, module in names.items() if module is table)
    return {n: first for n, m in names.items() if m is not table and own_weight(m) is weight}


def embeddings(pretrained: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a transformers model's embeddings and output head, as far as it names them."""
    try:
        layers = [getattr(pretrained, f"get_{end}_embeddings")() for end in ("input", "output")]
    except NotImplementedError:
        return []
    return [layer.weight for layer in layers if isinstance(getattr(layer, "weight", None), nn.Parameter)]


def patch_save_pretrained(modules: Collection[nn.Module]) -> None:
    """Let save_pretrained of transformers models with adapted layers warn that it writes no adapter. In place."""
    for module in _adapted_models(modules):
        patch(module, "save_pretrained", _save_pretrained)


def forget_quantization(modules: Iterable[nn.Module]) -> None:
    """Remove the marks of quantization from transformers models whose weights are plain now. In place.

    transformers refuses to move a model with such marks, and saves it as a quantized one.
    """
    for module in modules:
        if is_pretrained_model(module):
            if CONVERSIONS in vars(module):
                vars(module)[CONVERSIONS] = plain_conversions(module)
            for name in QUANTIZATION & vars(module).keys():
                delattr(module, name)
            vars(module.config).pop(QUANTIZATION_CONFIG, None)


def plain_conversions(pretrained: nn.Module) -> list[Any] | None:
    """Return a transformers 5 model's conversions at loading without those that read quantized weights.

    An operation of those is defined in transformers.integrations.
    """
    conversions = vars(pretrained)[CONVERSIONS]
    return conversions and [
        conversion
        for conversion in conversions
        if not any(
            type(operation).__module__.startswith("transformers.integrations")
            for operation in getattr(conversion, "operations", None) or ()
        )
    ]


def _save_pretrained(module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    state = kwargs.get("state_dict", args[2] if len(args) > 2 else None)  # merged_state_dict(model) is right
    if state is None and is_adapted(module):
        warnings.warn(
            f"lightning_lora: save_pretrained of {type(module).__name__} writes the base's weights, merged or not, and "
            "lora_A and lora_B too. from_pretrained ignores lora_A and lora_B, so that it loads the base. "
            "save_merged(model, path) writes merged weights for from_pretrained, save_adapter(model, path) the adapter "
            "for PEFT, and merge_and_unload(model) leaves a model whose save_pretrained is right.",
            stacklevel=2,
        )
    return call_previous(module, previous, "save_pretrained", *args, **kwargs)


def patch_gradient_checkpointing(modules: Collection[nn.Module]) -> None:
    """Let gradient checkpointing that is enabled later train the adapters of transformers models. In place."""
    for module in _adapted_models(modules):
        function = getattr(module, SET_CHECKPOINTING, None)
        if function is not None and "value" not in inspect.signature(function).parameters:  # the old form has it
            patch(module, SET_CHECKPOINTING, _set_gradient_checkpointing)


def _set_gradient_checkpointing(
    module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> None:
    call_previous(module, previous, SET_CHECKPOINTING, *args, **kwargs)
    enable_input_require_grads(list(module.modules()))


def _adapted_models(modules: Collection[nn.Module]) -> list[nn.Module]:
    """Return the transformers models with adapted layers among a model's modules, nested ones too."""
    classes = _classes_of_transformers(modules)
    return [module for module in modules if type(module) in classes and is_adapted(module)]


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module or a module inside it is adapted."""
    return any(isinstance(child, AdaptedModule) for child in module.modules())
