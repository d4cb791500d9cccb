"""What transformers' models say of themselves: where their weights come from, and which head did not.

Their classes are told by name, so that transformers is not imported here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn

from ..config import TASK_HEADS
from ..names import derives_from, names_factor, parent_names
from ..nn.adapted_module import AdaptedModule
from ..nn.adapted_weights import NamedModules
from ..nn.gradient_checkpointing import enable_input_require_grads
from .patches import call_previous, patch

SET_CHECKPOINTING = "_set_gradient_checkpointing"  # what both of transformers' public methods call
CONVERSIONS = "_weight_conversions"  # what a transformers 5 model's tensors went through when they were loaded
QUANTISATION_CONFIG = "quantization_config"  # in a configuration
QUANTISATION = {  # what transformers notes on a model that it has quantised
    *("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"),
    *("is_4bit_serializable", "is_8bit_serializable"),
}


def pretrained_models(modules: NamedModules) -> dict[str, nn.Module]:
    """Return the outermost transformers models in a module, or itself, by name.

    Args:
        modules: every module in it under its first name, itself first.
    """
    classes = {type(module): module for _, module in modules}  # of which a model has few
    of_transformers = {cls for cls, module in classes.items() if is_pretrained_model(module)}
    found: dict[str, nn.Module] = {}
    for name, module in modules if of_transformers else ():
        if type(module) in of_transformers and found.keys().isdisjoint(("", name, *parent_names(name))):
            found[name] = module
    return found


def is_pretrained_model(module: nn.Module) -> bool:
    """Tell whether a module is a transformers PreTrainedModel."""
    return derives_from(module, "PreTrainedModel", ("transformers",))


def base_name(modules: NamedModules) -> str:
    """Return the path or name of the one transformers model with adapted layers among a model's modules, or ""."""
    pretrained = pretrained_models(modules).values()
    names = {checkpoint_name(each) for each in pretrained if is_adapted(each)}
    return names.pop() if len(names) == 1 else ""


def checkpoint_name(pretrained: nn.Module) -> str:
    """Return the path or name that a transformers model was loaded from, or "" for one that was built from a config."""
    name = getattr(pretrained, "name_or_path", None)
    return name if isinstance(name, str) else ""


def new_heads(pretrained: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a transformers model that the checkpoint it came from cannot be known to hold, by name.

    They are what lies beside the body in a model for a task, unless the checkpoint is of the same class. Language
    models have none: checkpoints of other classes hold their output heads too.
    """
    config: Any = getattr(pretrained, "config", None)
    body = getattr(pretrained, getattr(pretrained, "base_model_prefix", ""), None)
    same_class = type(pretrained).__name__.removeprefix("FSDP") in (getattr(config, "architectures", None) or ())
    of_language = cast(Any, pretrained).get_output_embeddings() is not None
    if not checkpoint_name(pretrained) or same_class or of_language or not isinstance(body, nn.Module):
        return {}
    return {name: child for name, child in pretrained.named_children() if child is not body}


def resized_embeddings(modules: NamedModules) -> list[nn.Parameter]:
    """Return the embeddings, and output heads, with another number of rows than in the checkpoint they came from.

    PEFT's rule: config.vocab_size is another than in the checkpoint's own config, which is read from disk alone.
    """
    found: list[nn.Parameter] = []
    for pretrained in pretrained_models(modules).values():
        config: Any = getattr(pretrained, "config", None)
        if checkpoint_name(pretrained) and _vocabulary(config) not in (None, _vocabulary(_config_on_disk(pretrained))):
            found += embeddings(pretrained)
    return found


def input_embeddings(pretrained: nn.Module) -> nn.Module | None:
    """Return a transformers model's input embeddings, or None where it names none."""
    try:
        return cast("nn.Module | None", cast(Any, pretrained).get_input_embeddings())
    except NotImplementedError:
        return None


def tied_to_input(modules: NamedModules, prefix: str) -> dict[str, str]:
    """Return the modules that share the weight of a transformers model's input embeddings, each with that one's name.

    Args:
        modules: every module of a model under its first name, the model first.
        prefix: what the names in the transformers model have before them here, "" or ending in a dot.
        modules: those of the module.
    """
    pretrained = pretrained_models(modules).get(prefix.removesuffix("."))
    table = input_embeddings(pretrained) if pretrained is not None else None
    weight = table._parameters.get("weight") if table is not None else None  # an image model's may be a block
    if weight is None or not getattr(getattr(pretrained, "config", None), "tie_word_embeddings", False):
        return {}
    names = {name: module for name, module in modules if name}
    first = next(name for name, module in names.items() if module is table)
    return {n: first for n, m in names.items() if m is not table and m._parameters.get("weight") is weight}


def embeddings(pretrained: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a transformers model's embeddings and output head, as far as it names them."""
    try:
        layers = [getattr(pretrained, f"get_{end}_embeddings")() for end in ("input", "output")]
    except NotImplementedError:
        return []
    return [layer.weight for layer in layers if isinstance(getattr(layer, "weight", None), nn.Parameter)]


def _config_on_disk(pretrained: nn.Module) -> Any:
    config: Any = pretrained.config
    revision = getattr(config, "_commit_hash", None)
    try:
        return type(config).from_pretrained(checkpoint_name(pretrained), revision=revision, local_files_only=True)
    except (OSError, ValueError):  # gone since, or never was on this disk
        return config


def _vocabulary(config: Any) -> int | None:
    return getattr(config, "vocab_size", None)


def warn_before_save_pretrained(modules: Iterable[nn.Module]) -> None:
    """Patch transformers models with adapted layers so that save_pretrained, which writes no adapter, warns."""
    for module in _adapted_models(modules):
        patch(module, "save_pretrained", _save_pretrained)


def forget_quantisation(modules: Iterable[nn.Module]) -> None:
    """Let transformers models whose weights are plain now be saved and moved as such. In place."""
    for module in modules:
        if is_pretrained_model(module):
            if CONVERSIONS in vars(module):
                vars(module)[CONVERSIONS] = plain_conversions(module)
            for name in QUANTISATION & vars(module).keys():
                delattr(module, name)
            vars(module.config).pop(QUANTISATION_CONFIG, None)


def plain_conversions(pretrained: nn.Module) -> list[Any] | None:
    """Return what a transformers 5 model's tensors went through when they were loaded, but for quantisation's part."""
    conversions = vars(pretrained)[CONVERSIONS]
    return conversions and [each for each in conversions if not _dequantizes(each)]


def _dequantizes(conversion: Any) -> bool:
    """Tell whether a conversion reads quantised weights: its operation is of the integration with their package."""
    operations = getattr(conversion, "operations", None) or ()
    return any(type(operation).__module__.startswith("transformers.integrations") for operation in operations)


def _save_pretrained(module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    state = kwargs.get("state_dict", args[2] if len(args) > 2 else None)  # merged_state_dict(model) is right
    if state is None and is_adapted(module):
        warnings.warn(
            f"lightning_lora: save_pretrained of {type(module).__name__} writes the base's weights, merged or not, and "
            "lora_A and lora_B beside them, which from_pretrained leaves out: what it loads is the base. "
            "save_merged(model, path) writes merged weights for from_pretrained, save_adapter(model, path) the adapter "
            "for PEFT, and merge_and_unload(model) leaves a model whose save_pretrained is right.",
            stacklevel=2,
        )
    return call_previous(module, previous, "save_pretrained", *args, **kwargs)


def follow_gradient_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Patch transformers models with adapted layers so that checkpointing enabled from now on trains the adapters."""
    for module in _adapted_models(modules):
        function = getattr(module, SET_CHECKPOINTING, None)
        if function is not None and "value" not in inspect.signature(function).parameters:  # which the old form has
            patch(module, SET_CHECKPOINTING, _set_gradient_checkpointing)


def _set_gradient_checkpointing(
    module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> None:
    call_previous(module, previous, SET_CHECKPOINTING, *args, **kwargs)
    enable_input_require_grads(list(module.modules()))


def _adapted_models(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the transformers models with adapted layers among a model's modules, nested ones too."""
    return [module for module in modules if is_pretrained_model(module) and is_adapted(module)]


def is_adapted(module: nn.Module) -> bool:
    """Tell whether a module, or one inside of it, is adapted."""
    return any(isinstance(child, AdaptedModule) for child in module.modules())


def warn_of_new_heads(modules: NamedModules) -> None:
    """Warn of the heads of transformers models that start from random values and are not trained whole.

    Args:
        modules: every module of a model under its first name, the model first.
    """
    for pretrained in pretrained_models(modules).values():
        frozen = [
            name
            for name, head in new_heads(pretrained).items()
            if any(not p.requires_grad for leaf, p in head.named_parameters() if not names_factor(leaf))
        ]
        if not frozen:
            continue
        kind, architectures = type(pretrained).__name__, getattr(pretrained.config, "architectures", None)
        checkpoint = f"{checkpoint_name(pretrained)!r} ({', '.join(architectures or ['of unknown class'])})"
        tasks = [f"task_type={task!r}" for task, heads in TASK_HEADS.items() if set(frozen) <= set(heads)]
        warnings.warn(
            f"lightning_lora: the head of {kind} ({', '.join(frozen)}) starts from random values, which {checkpoint} "
            "does not hold, and stays frozen: an adapter trained beside it fits no other program's head. Train it "
            f"whole, with modules_to_save={frozen}" + (f" or {tasks[0]}." if tasks else "."),
            stacklevel=2,
        )
