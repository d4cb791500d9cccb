"""Find the heads of models, and say which of them may start from random values.

Models of transformers and timm tell. Of other models there are only the names of their layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..config import TASK_HEADS
from ..distributed.flat import own_weight
from ..matching import matcher
from ..names import join_names, names_factor, parent_names
from ..nn.adapted_module import NamedModules, adapters_in
from ..nn.quantized import NF4, is_of_lightning, is_of_torchao, quantized_as, quantized_parameters, was_never_quantized
from .pretrained import checkpoint_name, pretrained_models

HEADS = ("head", "heads", "fc", "classifier")  # torchvision's names of heads
LOADED = "_is_hf_initialized"  # of transformers 5: on each parameter that was in the checkpoint, or is tied to one


def output_heads(modules: NamedModules) -> list[nn.Module]:
    """Return the heads that models of transformers and timm among these modules tell, with what is inside of timm's."""
    getters = [getattr(module, "get_output_embeddings", None) for _, module in modules]
    of_transformers = [getter() for getter in getters if callable(getter)]
    of_timm = [head for model in timm_models(modules).values() for head in _classifiers(model)]
    inside = [module for head in of_timm for module in head.modules()]
    return [head for head in (*of_transformers, *inside) if isinstance(head, nn.Module)]


def timm_models(modules: NamedModules) -> dict[str, nn.Module]:
    """Return the models of timm that tell their head, by name. One may lie in another."""
    tell = ((name, module) for name, module in modules if callable(getattr(module, "get_classifier", None)))
    return {name: m for name, m in tell if any(cls.__module__.startswith("timm.") for cls in type(m).__mro__)}


def _classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the heads of a model of timm. Some models have two."""
    found = cast(Any, model).get_classifier()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def new_heads(pretrained: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules of a transformers model of which its checkpoint holds no weight, by name.

    They are children of the model or of its body: deeper ones may have lost transformers' mark by dequantization. Where
    nothing is marked, the names tell, as far as they can. Language models have none: their output head is often tied,
    or resized.
    """
    if not checkpoint_name(pretrained) or cast(Any, pretrained).get_output_embeddings() is not None:
        return {}
    weights = {name: p for name, p in pretrained.named_parameters() if not names_factor(name)}
    if not any(hasattr(weight, LOADED) for weight in weights.values()):  # older than 5, sharded, or a copy
        return _beside_the_body(pretrained)
    computed = getattr(pretrained, "_keys_to_ignore_on_load_missing", None) or ()  # patterns
    held = {
        name
        for name, weight in weights.items()
        # A weight that was quantized or distributed since then is of another type, and has no mark.
        if hasattr(weight, LOADED) or type(weight) is not nn.Parameter or any(re.search(c, name) for c in computed)
    }
    with_held = {module for name in held for module in parent_names(name)}
    missing = [next((m for m in parent_names(name) if m not in with_held), "") for name in weights if name not in held]
    return {name: pretrained.get_submodule(name) for name in dict.fromkeys(missing) if name and name.count(".") < 2}


def _beside_the_body(pretrained: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a model for a task beside its body, unless its checkpoint is of the same class."""
    config: Any = getattr(pretrained, "config", None)
    body = getattr(pretrained, getattr(pretrained, "base_model_prefix", ""), None)
    same_class = type(pretrained).__name__.removeprefix("FSDP") in (getattr(config, "architectures", None) or ())
    if same_class or not isinstance(body, nn.Module):
        return {}
    return {name: child for name, child in pretrained.named_children() if child is not body}


def to_train_whole(modules: NamedModules, entries: Iterable[str]) -> list[str]:
    """Return the names of modules to be fully trained, which no quantization may have: those of the options, new ones.

    New are the heads of `new_heads`, and layers of bitsandbytes that were never quantized.

    Args:
        modules: every module of a model under its first name, the model first.
        entries: of modules_to_save, and of the task.
    """
    names = list(filter(matcher(entries), dict(modules)))
    for path, model in pretrained_models(modules).items():
        heads = new_heads(model).items()
        names += [join_names(path, name) for name, head in heads if any(True for _ in head.parameters())]
    names += [name for name, module in modules if was_never_quantized(module)]
    return [name for name in dict.fromkeys(names) if not set(names).intersection(parent_names(name))]


def short_name(name: str, modules: NamedModules) -> str:
    """Return a module's name in its model of transformers, or its whole name where an option would name others too."""
    short = _in_pretrained(name, modules)
    return short if sum(map(matcher([short]), dict(modules))) == 1 else name


def _in_pretrained(name: str, modules: NamedModules) -> str:
    """Return a module's name in the model of transformers that it lies in."""
    paths = (f"{path}." for path in pretrained_models(modules) if path)
    return next((name.removeprefix(path) for path in paths if name.startswith(path)), name)


def warn_of_new_heads(modules: NamedModules, saved: Collection[str] = ()) -> None:
    """Warn of heads of transformers' models that have random values and are not fully trained.

    Args:
        modules: every module of a model under its first name, the model first.
        saved: modules_to_save as it is, which the remedy goes on with.
    """
    pretrained = pretrained_models(modules)
    for model in pretrained.values():
        heads = new_heads(model)
        frozen = _frozen(heads)
        architectures = getattr(model.config, "architectures", None) or ["of unknown class"]
        checkpoint = f"{checkpoint_name(model)!r} ({', '.join(architectures)})"
        if frozen:
            tasks = [task for task, added in TASK_HEADS.items() if all(map(matcher(added), frozen))]
            task = f" or task_type={tasks[0]!r}" if tasks else ""
            layers = [layer for head in heads.values() for layer in head.modules()]
            under_its_adapter = " under its adapter" if any(map(adapters_in, layers)) else ""
            quantized = [layer for layer in layers if quantized_parameters(layer) or was_never_quantized(layer)]
            plain = option_that_leaves_plain(modules, to_train_whole(modules, saved), quantized[0]) if quantized else ""
            body = f"{getattr(model, 'base_model_prefix', '')}."
            what = "a part" if any(name.startswith(body) for name in frozen) else "the head"  # bert.pooler is no head
            warnings.warn(
                f"lightning_lora: {what} of {type(model).__name__} ({', '.join(frozen)}) starts from random values, "
                f"because {checkpoint} does not hold it, and stays frozen{under_its_adapter}: an adapter that is "
                "trained with it fits no other random values. Train it whole, with "
                f"modules_to_save={[*saved, *frozen]}{task}"
                + (f", and leave it out of the quantization, with which it may not run: {plain}." if plain else "."),
                stacklevel=2,
            )


def option_that_leaves_plain(modules: NamedModules, names: Sequence[str], layer: nn.Module) -> str:
    """Return the option that leaves modules out of the quantization, by what has quantized one of their layers.

    What transformers has left out already is named too, so that the option can be copied.

    Args:
        modules: every module of a model under its first name, the model first.
        names: of the modules.
        layer: of bitsandbytes, or with a quantized weight.
    """
    if NF4 in map(quantized_as, quantized_parameters(layer).values()):
        return f"quantize_base(model, modules_to_save={names})"
    if is_of_lightning(layer):
        return f"BitsandbytesPrecision(..., ignore_modules={{{', '.join(map(repr, names))}}})"
    inside = [_in_pretrained(name, modules) for name in names]
    left_out: set[str] = set()  # by transformers: what the user named, or else what it chose itself
    for model in pretrained_models(modules).values():
        entries = getattr(getattr(model, "hf_quantizer", None), "modules_to_not_convert", None) or ()
        left_out |= {*entries}.difference(name for name, _ in model.named_parameters())
    inside = list(dict.fromkeys((*inside, *sorted(left_out))))
    if is_of_torchao(own_weight(layer)):
        return f"TorchAoConfig(..., modules_to_not_convert={inside}), or filter_fn of torchao's quantize_"
    return f"BitsAndBytesConfig(..., llm_int8_skip_modules={inside})"


def _frozen(heads: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the heads that are not fully trained."""
    return [
        name
        for name, head in heads.items()
        if any(not p.requires_grad for leaf, p in head.named_parameters() if not names_factor(leaf))
    ]


def describe_frozen_head(modules: NamedModules) -> str:
    """Say which head of a model that does not tell whether it is new is frozen, and how to train it, or return "".

    It is a head that a model of timm tells, or else the last linear layer outside of transformers' models, where the
    last part of its name that is no number is one of HEADS. Whether it is new nobody knows here: weights may have been
    loaded into it, and any number of classes may be the one that it was trained with.

    Args:
        modules: every module of a model under its first name, the model first.
    """
    pretrained, of_timm = pretrained_models(modules), timm_models(modules)
    classifiers = [
        head for name, model in of_timm.items() if not _is_in(name, pretrained) for head in _classifiers(model)
    ]
    heads = {name: module for name, module in modules if any(module is head for head in classifiers)}
    telling = (*pretrained, *of_timm)
    linear = [(name, module) for name, module in modules if isinstance(module, nn.Linear) and not _is_in(name, telling)]
    for name, module in linear[-1:]:
        title = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        if title in HEADS and own_weight(module) is not None:
            heads[name] = module
    frozen = _frozen(heads)
    if not frozen:
        return ""
    adapted = any(adapters_in(layer) for name in frozen for layer in heads[name].modules())
    is_frozen = f"{', '.join(frozen)} {'is' if len(frozen) == 1 else 'are'} frozen{' under an adapter' * adapted}"
    return f"{is_frozen}; if new: modules_to_save={frozen}"


def _is_in(name: str, models: Collection[str]) -> bool:
    """Return whether a module is one of these models, or lies in one."""
    return any(not model or f"{name}.".startswith(f"{model}.") for model in models)
