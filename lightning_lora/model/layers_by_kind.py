"""What "all-linear" and "all-layers" mean: the layers that they adapt in a model, and why they leave others out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..config import DEFAULT_VARIANT, LoRAConfig
from ..matching import ALL_LAYERS, matcher
from ..names import parent_names
from ..nn.adapted_module import NamedModules
from ..nn.foreign_linear import is_foreign_linear
from ..nn.layer_kinds import MORE_MODULES, layer_class
from ..nn.linear import is_conv1d
from ..nn.low_rank import GROUPED_CONV
from ..nn.tied_weights import tied_weights
from ..nn.variant import variant_of
from .heads import output_heads
from .pretrained import pretrained_models
from .token_tables import OPTION

MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}  # PEFT's list of model_type
BY_NAME = "layers of other libraries are adapted by name"  # the beginning of a reason
REFUSED_IN_MAMBA = {"out_proj", "conv1d"}  # PEFT's list of last segments


def layers_by_kind(
    listed_modules: NamedModules, config: LoRAConfig, tables: Collection[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the layers that "all-linear" or "all-layers" adapts.

    Args:
        listed_modules: every module of the model under its first name, the model first.
        config: the options, with one of the two as target_modules.
        tables: the names of the modules of which rows are trained.

    Returns:
        The layers by name, and why other layers of these kinds are left out, by name.
    """
    more = config.target_modules == ALL_LAYERS
    heads, tied = {id(head) for head in output_heads(listed_modules)}, tied_weights(listed_modules)
    configs = {name: getattr(module, "config", None) for name, module in pretrained_models(listed_modules).items()}
    mamba = [name for name, of_model in configs.items() if getattr(of_model, "model_type", None) in MAMBA]
    in_mamba = tuple(f"{name}.".lstrip(".") for name in mamba)
    has_conv1d = any(is_conv1d(module) for _, module in listed_modules)
    modules, chosen, left_out = dict(listed_modules), dict[str, nn.Module](), dict[str, str]()
    for name, module in modules.items():
        is_linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if not name or not (is_linear or (more and isinstance(module, MORE_MODULES))):
            continue
        parent, _, last = name.rpartition(".")
        owner = modules.get(parent) if parent else None
        if name in tables:
            reason = f"{OPTION} trains rows of it"
        elif id(module) in heads:
            reason = "it is the output head"
        elif isinstance(owner, nn.MultiheadAttention) and parent in chosen:
            reason = ""  # attention is adapted with its out_proj
        elif name.startswith(in_mamba) and last in REFUSED_IN_MAMBA:
            reason = f"PEFT cannot adapt the {last} of Mamba"
        elif module in tied:
            reason = f"its weight is also {tied[module]}"
        else:
            reason = _why_left_out(module, owner, config, has_conv1d=has_conv1d)
        if reason:
            left_out[name] = reason
        else:
            chosen[name] = module
    foreign = _foreign_layers(modules, config, heads)
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in foreign))
    targets = ends if sum(map(matcher(ends), modules)) == len(foreign) else foreign
    return chosen, left_out | dict.fromkeys(foreign, f"{BY_NAME}, target_modules={targets}")


def _foreign_layers(modules: Mapping[str, nn.Module], config: LoRAConfig, heads: Collection[int]) -> list[str]:
    """Return the names of foreign linear layers that target_modules could name, without those around other layers."""
    excluded, saved = matcher(config.exclude_modules), matcher(config.all_modules_to_save())
    found = [name for name, module in modules.items() if name and id(module) not in heads and is_foreign_linear(module)]
    return [
        name
        for name in found
        if layer_class(modules[name], variant_of(config)) is not None
        and not any(layer_class(inner) for inner in modules[name].modules() if inner is not modules[name])
        and not any(map(saved, (name, *parent_names(name))))
        and not excluded(name)
    ]


def _why_left_out(module: nn.Module, owner: nn.Module | None, config: LoRAConfig, *, has_conv1d: bool) -> str:
    """Return why PEFT's file or the variant cannot hold an adapter of this layer, or ""."""
    attention = next((each for each in (module, owner) if isinstance(each, nn.MultiheadAttention)), None)
    if attention is not None:
        which = "attention" if attention is module else "the out_proj of attention"
        if not attention._qkv_same_embed_dim:
            return f"PEFT cannot adapt {which} with q, k and v apart"
        if has_conv1d:
            return f"PEFT cannot adapt {which} in a model with transformers' Conv1D"
        return (
            f"PEFT cannot adapt {which} with {variant_of(config).option}" if config.variant != DEFAULT_VARIANT else ""
        )
    if isinstance(module, nn.Linear):
        return ""
    variant, adapting = variant_of(config), layer_class(module, variant_of(config))
    if variant.peft_type and getattr(module, "groups", 1) > 1 and variant.why_not_in_peft(GROUPED_CONV):
        return "PEFT cannot adapt a convolution with groups"
    if adapting is None:
        return f"{variant.option} cannot adapt a {type(module).__name__}"
    return variant.why_not_on(module, adapting.KIND, config)
