"""PEFT's options, from and to ours. Options that cannot be applied are refused by name.

Most fields of adapter_config.json are LoRAConfig's. The lists here name the others.

PEFT's modules_to_save takes every module whose name ends in an entry, in the middle of a segment too: `head` takes
lm_head, and `norm` takes input_layernorm. PEFT wants all tensors of each module that it takes in the file. It trains a
copy of each module. So one end of tied weights is trained alone, or both ends are trained apart. The option
ensure_weight_tying changes that for modules that are called embed_tokens and lm_head.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any, get_args

from ..adapter.adapter import Adapter
from ..adapter.values import equal_tables, ties_of
from ..config import (
    DEFAULT_VARIANT,
    IGNORED_PEFT_FIELDS,
    TASK_HEADS,
    LoRAConfig,
    Task,
    defaults_of,
    options_in_peft,
)
from ..errors import LoRAError, sentence, shown
from ..matching import PATTERNS, exact_key, matcher
from ..names import KNOWN_VARIANTS, listed, parent_names, suffixes
from ..nn.low_rank import CONV1D, EMBEDDING, LINEAR, PARAMETER
from ..nn.variant import Variant, known_variants
from .peft_rows import OPTION

SHARED = tuple(sorted(options_in_peft("same"), key=PATTERNS.__contains__))  # patterns last, as in all files until now
BY_NUMBER = ("layers_to_transform", "layers_pattern")
SELECTING = options_in_peft("by tensors")
ORIGIN = ("base_model_name_or_path", "revision", "task_type")
OUR_INITS = (True, False, "gaussian", "orthogonal")  # plain adapters draw the same first values in PEFT
ORTHOGONAL_IN_PEFT = {LINEAR, CONV1D, EMBEDDING}
# These change the base before training. Their adapter fits the changed weights alone.
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
WITHOUT_EFFECT = {  # on what the stored tensors mean
    *IGNORED_PEFT_FIELDS,
    "init_lora_weights",
}
TIED_BY_PEFT = ("embed_tokens", "lm_head")  # the names of modules that ensure_weight_tying knows


def options_to_peft(adapter: Adapter, verb: str) -> dict[str, Any]:
    """Return the fields of adapter_config.json for an adapter in PEFT's form."""
    try:
        options = adapter.variant.options_to_peft(lora_options(adapter))
    except ValueError as error:
        raise LoRAError(f"{verb}: {sentence(error)}") from None
    return {**options, "peft_type": adapter.variant.peft_type}


def lora_options(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of a peft.LoraConfig for an adapter in PEFT's form; its variant may have others.

    What selects layers is written by layer. The user's own options stand in the description in the tensor file.
    """
    config = adapter.config or LoRAConfig()
    options = config.to_dict() | ranks_and_alphas(adapter)
    return {
        **{name: options[name] for name in SHARED if name in options},
        "peft_type": "LORA",
        "target_modules": _target_modules(adapter),
        **({"target_parameters": adapter.parameters} if adapter.parameters else {}),
        **({OPTION: {table: list(rows) for table, rows in adapter.tables.items()}} if adapter.tables else {}),
        "exclude_modules": None,
        "modules_to_save": to_peft_entries(adapter),
        **({"ensure_weight_tying": True} if is_tied_by_peft(adapter) else {}),
        "init_lora_weights": _init_in_peft(adapter, options["init_lora_weights"]),
        "fan_in_fan_out": adapter.fan_in_fan_out or bool(adapter.of_kind(CONV1D)),
        "inference_mode": True,
        **{name: adapter.origin.get(name) for name in ORIGIN},
        **({"task_type": config.task_type} if config.task_type else {}),
        **config.all_variant_options(),
    }


def ranks_and_alphas(adapter: Adapter) -> dict[str, Any]:
    """Return r and lora_alpha of most layers, and patterns that name each other layer. Only here patterns are made.

    If all layers have one r and one lora_alpha, there are no patterns, as vLLM needs it. The out_proj of attention has
    the options of its attention in PEFT.
    """
    config, layers = adapter.config or LoRAConfig(), adapter.layers
    own = [name for name in layers if adapter.options_name(name) == name]
    ranks = {name: layers[name].r for name in own}
    alphas = {name: config.alpha_of(ranks[name], adapter.scaling(name)) for name in own}
    if not own:
        return {"rank_pattern": {}, "alpha_pattern": {}}
    r, alpha = mode(ranks.values()), mode(alphas.values())
    return defaults_of("ranks") | {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {exact_key(name): each for name, each in ranks.items() if each != r},
        "alpha_pattern": {exact_key(name): each for name, each in alphas.items() if each != alpha},
    }


def with_ranks_in_options(adapter: Adapter) -> Adapter:
    """Return an adapter whose layers have got other ranks or scalings, with options that say so."""
    return replace(adapter, config=replace(adapter.config or LoRAConfig(), **ranks_and_alphas(adapter)))


def _init_in_peft(adapter: Adapter, init: Any) -> Any:
    """Return an init that PEFT has for each of the layers. PEFT replaces its values by those in the file."""
    kinds = {layer.kind for layer in adapter.layers.values()} - {""} | ({PARAMETER} if adapter.parameters else set())
    if init == "orthogonal" and not kinds <= ORTHOGONAL_IN_PEFT:
        return True
    return init if init in OUR_INITS else True


def _target_modules(adapter: Adapter) -> str | list[str]:
    """Return the layers' last segments, their names or an expression: the first that names these layers alone.

    Without a fingerprint the base's other modules are not known, and a segment might name one of them too. So might a
    number, as that of a module without weights.
    """
    layers = [name for name in adapter.module_layers if adapter.options_name(name) == name]
    segments = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    unsure = not adapter.fingerprint and any(map(str.isdigit, layers))  # "0" would take an unknown "2.0" too
    by_segment = bool(adapter.fingerprint) and not any(map(str.isdigit, segments))
    for names in () if unsure else (segments, layers) if by_segment else (layers,):
        if layers and set(filter(matcher(names), adapter.modules)) == set(layers):
            return names
    return "|".join(map(re.escape, layers)) if layers else []


def from_peft_options(options: Mapping[str, Any], path: Path) -> tuple[Variant, dict[str, Any]]:
    """Return the variant of an adapter_config.json, and its fields as a peft.LoraConfig has them.

    Raises:
        LoRAError: no variant that is known here has this peft_type, or the variant cannot apply a field.
    """
    found = options.get("peft_type")
    by_type = {each.peft_type: each for each in reversed(known_variants()) if each.peft_type}
    if not isinstance(found, str) or found not in by_type:
        raise LoRAError(
            f"{path}: peft_type is {shown(found)}, only {listed(sorted(map(repr, by_type)), len(by_type))} is read; "
            "import the file that defines another variant before loading."
        )
    try:
        return by_type[found], {**by_type[found].options_from_peft(options)}
    except ValueError as error:
        raise LoRAError(f"{path}: {sentence(error)}") from None


def refuse_options(options: Mapping[str, Any], variant: Variant, path: Path) -> None:
    """Raise LoRAError for the first field, of a peft.LoraConfig or the variant's own, that is not applied."""
    known = {*SHARED, *SELECTING, *ORIGIN, *WITHOUT_EFFECT, *variant.own_options}
    for name, value in options.items():
        if name not in known and value:
            raise LoRAError(
                f"{path}: {name}={shown(value)} cannot be applied; only plain {variant.title} adapters are read."
            )
    init = options.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(INITS_THAT_CHANGE_THE_BASE):
        raise LoRAError(
            f"{path}: init_lora_weights={init!r} changed the base weights before training, so the adapter does not fit "
            "the original base; convert it with PEFT's path_initial_model_for_weight_conversion."
        )


def options_from_peft(
    options: Mapping[str, Any],
    layers: Sequence[str],
    whole: Iterable[str],
    tables: Mapping[str, Sequence[int]],
    variant: str = DEFAULT_VARIANT,
) -> LoRAConfig:
    """Translate the options of adapter_config.json into a LoRAConfig.

    Args:
        options: the fields of a peft.LoraConfig.
        layers: the adapted layers that the tensors name.
        whole: names of parameters that the tensors hold whole. A task_type whose head is not among them is left out:
            transformers writes one for adapters without a head.
        tables: the numbers of the trained rows of each table that has such rows.
        variant: the name of the variant, where the fields do not say it.

    Raises:
        LoRAError: an option has a value that is not allowed.
    """
    config = {name: options[name] for name in (*SHARED, *SELECTING) if options.get(name) is not None}
    if isinstance(config.get("target_modules"), str) or config.get("layers_to_transform") in (None, []):
        config = {name: value for name, value in config.items() if name not in BY_NUMBER}  # PEFT ignored them
    if isinstance(config.get("modules_to_save"), list):
        config["modules_to_save"] = from_peft_entries(entries_in(options), whole)
    named = {suffix for name in whole for module in parent_names(name) for suffix in suffixes(module)}
    task = options.get("task_type")
    if task in get_args(Task) and (task not in TASK_HEADS or not {*TASK_HEADS[task]}.isdisjoint(named)):
        config["task_type"] = task
    config[OPTION] = dict(tables)
    init = options.get("init_lora_weights", True)
    config["init_lora_weights"] = init if isinstance(init, (bool, str)) and init in OUR_INITS else True
    if variant != DEFAULT_VARIANT:
        own = {name: options[name] for name in KNOWN_VARIANTS[variant].own_options if name in options}
        config |= {"variant": variant, "variant_options": own}
    return LoRAConfig(**{"target_modules": layers, **config})


def origin_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that name the base."""
    return {name: options[name] for name in ORIGIN if isinstance(options.get(name), str)}


# --- modules_to_save ---


def entries_in(options: Mapping[str, Any]) -> list[str]:
    """Return modules_to_save out of adapter_config.json's fields."""
    entries = options.get("modules_to_save")
    return [entry for entry in entries if isinstance(entry, str) and entry] if isinstance(entries, list) else []


def from_peft_entries(entries: Iterable[str], whole: Iterable[str]) -> list[str]:
    """Translate PEFT's entries into dotted suffixes of module names.

    Args:
        entries: PEFT's modules_to_save. PEFT adds entries that may name nothing; these are left out.
        whole: names of parameters that the file holds whole.
    """
    taken: dict[str, set[str]] = {entry: set() for entry in entries}
    for module in {module for name in whole for module in parent_names(name)}:
        for start in range(len(module)):  # one look-up for each ending: there may be as many entries as modules
            entry = module[start:]
            if entry in taken:
                taken[entry].add(".".join(module.split(".")[-1 - entry.count(".") :]))
    in_order = ([*sorted(names & {entry}), *sorted(names - {entry})] for entry, names in taken.items())
    return list(dict.fromkeys(itertools.chain.from_iterable(in_order)))


def to_peft_entries(adapter: Adapter) -> list[str] | None:
    """Return PEFT's modules_to_save for an adapter: its own entries, or full names where those would take more."""
    entries = (adapter.config or LoRAConfig()).all_modules_to_save()
    if not entries:
        return None
    if _taken_besides(adapter, entries):
        full_names = sorted(filter(matcher(entries), adapter.modules))
        entries = min(entries, full_names, key=lambda names: len(_taken_besides(adapter, names)))
    if not is_tied_by_peft(adapter):
        ends = ties_of(_names_saved(adapter), adapter.whole_tensors())
        entries += sorted(name.rpartition(".")[0] for name in ends)
    return entries or None


def frozen_in_saved(adapter: Adapter, verb: str) -> list[str]:
    """Return the names of frozen tensors that PEFT wants in the file: they lie in modules that its entries take.

    Raises:
        LoRAError: PEFT's entries take an adapted layer too, and PEFT cannot do both.
    """
    taken = _taken_besides(adapter, to_peft_entries(adapter) or ())
    layers = [layer for layer in (*adapter.layers, *adapter.tables) if layer in taken]
    if layers:
        raise LoRAError(
            f"{verb}: PEFT's modules_to_save takes every module whose name ends in an entry, so that "
            f"{layers[0]!r}, which is adapted, would be fully trained too. Save a Lightning checkpoint instead; for a "
            f"folder, train with {layers[0].rpartition('.')[2]!r} in modules_to_save or exclude_modules."
        )
    return taken


def is_tied_by_peft(adapter: Adapter) -> bool:
    """Return whether both ends of a tie were trained as one and PEFT's ensure_weight_tying can express it."""
    entries = (adapter.config.modules_to_save if adapter.config is not None else None) or ()
    if not any(entry.rpartition(".")[2] in TIED_BY_PEFT for entry in entries):
        return False
    saved = _names_saved(adapter)
    return any(group & saved for group in equal_tables(adapter.whole_tensors()))


def _names_saved(adapter: Adapter) -> set[str]:
    is_saved = matcher(adapter.config.all_modules_to_save() if adapter.config is not None else None)
    return {name for name in adapter.whole_tensors() if any(map(is_saved, parent_names(name)))}


def _taken_besides(adapter: Adapter, entries: Collection[str]) -> list[str]:
    """Return the frozen tensors and adapted layers in modules that PEFT's entries take."""
    if not entries:
        return []
    frozen = sorted(adapter.fingerprint.keys() - adapter.tensors.keys())
    inside = {name: parent_names(name) for name in frozen}
    inside |= {name: [*parent_names(name), name, f"{name}.base_layer"] for name in adapter.layers}  # as PEFT wraps it
    inside |= {name: [*parent_names(name), name, f"{name}.token_adapter.base_layer"] for name in adapter.tables}
    ends = tuple(entries)
    return [name for name, modules in inside.items() if any(module.endswith(ends) for module in modules)]
