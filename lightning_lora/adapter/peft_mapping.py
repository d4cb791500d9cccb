"""PEFT's options and equivalent factors, from and to ours. What cannot be applied is refused by name.

Options: adapter_config.json's fields are LoRAConfig's but for those that are listed here.

Equivalents: with enable_lora, n parts with factors (r, in) and (out / len, r) equal one adapter of rank n * r with the
same A and a B that is block diagonal, with zero rows for the parts that are left alone. The scaling stays, so
lora_alpha grows. PEFT adapts attention whole: where out_proj alone is adapted, in_proj gets factors that are both zero,
and so stay zero when PEFT trains on. Of attention's out_proj peft adds the change twice, in forward and in merge
(measured on 0.21.2; a fix is proposed in huggingface/peft#3774). So B is halved on the way out and doubled on the way
in, which is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..config import IGNORED_PEFT_FIELDS, PLAIN, TASK_HEADS, VARIANTS, LoRAConfig, Task
from ..errors import LoRAError, sentence, shown
from ..matching import matcher, pattern_matches
from ..names import KNOWN_VARIANTS, A, B, listed, parent_names, suffixes
from ..nn.low_rank import (
    ATTENTION,
    ATTENTION_OUTPUT,
    CONV1D,
    EMBEDDING,
    IN_PROJ,
    LINEAR,
    PARAMETER,
    from_block_diagonal,
    to_block_diagonal,
)
from ..nn.variant import Variant, known_variants
from .adapter import Adapter, exact_options, options_hold
from .peft_attention import turn
from .peft_rows import OPTION
from .peft_saved_modules import entries_in, from_peft_entries, is_tied_by_peft, to_peft_entries

SHARED = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", *VARIANTS, "rank_pattern", "alpha_pattern")
BY_NUMBER = ("layers_to_transform", "layers_pattern")
SELECTING = ("target_modules", "target_parameters", "exclude_modules", *BY_NUMBER, "modules_to_save", OPTION)
ORIGIN = ("base_model_name_or_path", "revision", "task_type")
OUR_INITS = (True, False, "gaussian", "orthogonal")  # of plain adapters, which draw the same in PEFT
ORTHOGONAL_IN_PEFT = {LINEAR, CONV1D, EMBEDDING}
# What these start from is not the base any more: their adapter fits only the weights that they left behind.
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
WITHOUT_EFFECT = {  # on what the stored tensors mean
    *IGNORED_PEFT_FIELDS,
    "init_lora_weights",
    "ensure_weight_tying",  # of tied weights the values tell
}

OUT_PROJ_COUNTS = 2  # times
LAST_KNOWN_PEFT = (0, 21)


def options_to_peft(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of adapter_config.json for an adapter in PEFT's form."""
    try:
        options = adapter.variant.options_to_peft(lora_options(adapter))
    except ValueError as error:
        raise LoRAError(f"save_adapter: {sentence(error)}") from None
    return {**options, "peft_type": adapter.variant.peft_type}


def lora_options(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of a peft.LoraConfig for an adapter in PEFT's form; its variant may have others.

    Where all layers agree there is one r and one lora_alpha, as vLLM needs it, and patterns name those that do not.
    """
    ranks = {name: r for name, r in adapter.ranks().items() if adapter.kinds.get(name) != ATTENTION_OUTPUT}
    config = adapter.config or LoRAConfig()
    if not options_hold(config, ranks, adapter.scalings):
        config = exact_options(config, ranks, adapter.scalings, adapter.parameters)
    options = config.to_dict()
    return {
        **{name: options[name] for name in SHARED if name in options},
        **{name: _pattern_in_peft(adapter, options[name]) for name in ("rank_pattern", "alpha_pattern")},
        "peft_type": "LORA",
        "target_modules": _target_modules(adapter, [name for name in ranks if not adapter.is_parameter(name)]),
        **({"target_parameters": _target_parameters(adapter)} if adapter.parameters else {}),
        **({OPTION: {table: list(rows) for table, rows in adapter.tables.items()}} if adapter.tables else {}),
        "exclude_modules": None,
        "modules_to_save": to_peft_entries(adapter),
        **({"ensure_weight_tying": True} if is_tied_by_peft(adapter) else {}),
        "init_lora_weights": _init_in_peft(adapter, options["init_lora_weights"]),
        "fan_in_fan_out": fan_in_fan_out_in_peft(adapter),
        "inference_mode": True,
        **{name: adapter.origin.get(name) for name in ORIGIN},
        **({"task_type": config.task_type} if config.task_type else {}),
        **config.all_variant_options(),
    }


def _pattern_in_peft(adapter: Adapter, pattern: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a pattern without keys of nothing but attention's out_proj, which has the attention's options in PEFT."""
    outputs = [name for name, kind in adapter.kinds.items() if kind == ATTENTION_OUTPUT]
    others = [name for name in adapter.layers() if adapter.kinds.get(name) != ATTENTION_OUTPUT]

    def is_of_output(key: str) -> bool:
        return any(pattern_matches(key, name) for name in outputs) and not any(pattern_matches(key, n) for n in others)

    return {key: value for key, value in (pattern or {}).items() if not is_of_output(key)}


def fan_in_fan_out_in_peft(adapter: Adapter) -> bool:
    """Return adapter_config.json's fan_in_fan_out."""
    return adapter.fan_in_fan_out or CONV1D in adapter.kinds.values()


def _init_in_peft(adapter: Adapter, init: Any) -> Any:
    """Return an init with which PEFT makes each of the layers; the values in the file take its place."""
    kinds = {*adapter.kinds.values()} | ({PARAMETER} if adapter.parameters else set())
    if init == "orthogonal" and not kinds <= ORTHOGONAL_IN_PEFT:
        return True
    return init if init in OUR_INITS else True


def _target_modules(adapter: Adapter, layers: list[str]) -> str | list[str]:
    """Choose the user's own list or the layers' names if they match no other module's suffix, else an expression.

    Options that take layers out of the user's list are not written: the names of the layers that are left say the same.
    """
    modules = {name.rpartition(".")[0] for name in (*adapter.tensors, *adapter.fingerprint)} - {""}
    config = adapter.config
    configured = () if config is None or config.exclude_modules or config.layers_to_transform else config.target_modules
    for names in (configured, layers):
        if not isinstance(names, str) and layers and set(filter(matcher(names), modules)) == set(layers):
            return list(names)
    return "|".join(map(re.escape, layers)) if layers else []


def _target_parameters(adapter: Adapter) -> list[str]:
    """Choose the user's own list if it matches no other parameter's suffix, else the full names."""
    parameters, configured = adapter.parameters, (adapter.config or LoRAConfig()).target_parameters
    known = {*parameters, *adapter.fingerprint}
    return list(configured or ()) if set(filter(matcher(configured), known)) == set(parameters) else parameters


def from_peft_options(options: Mapping[str, Any], path: Path) -> tuple[Variant, dict[str, Any]]:
    """Return the variant that adapter_config.json is of, and its fields as a peft.LoraConfig has them.

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
    variant: str = PLAIN,
) -> LoRAConfig:
    """Return LoRAConfig's options out of those of adapter_config.json.

    Args:
        options: the fields of a peft.LoraConfig.
        layers: the adapted layers that the tensors name.
        whole: names of parameters that the tensors hold whole. Of a task_type whose head has none nothing is taken:
            that of an adapter that transformers made stands for no head.
        tables: which rows are trained of each table that has such.
        variant: the name of the variant, where the fields do not say it.

    Raises:
        LoRAError: an option has a value that is not allowed.
    """
    config = {name: options[name] for name in (*SHARED, *SELECTING) if options.get(name) is not None}
    if isinstance(config.get("target_modules"), str) or config.get("layers_to_transform") in (None, []):
        config = {name: value for name, value in config.items() if name not in BY_NUMBER}  # which PEFT passed over
    if isinstance(config.get("modules_to_save"), list):
        config["modules_to_save"] = from_peft_entries(entries_in(options), whole)
    named = {suffix for name in whole for module in parent_names(name) for suffix in suffixes(module)}
    task = options.get("task_type")
    if task in get_args(Task) and (task not in TASK_HEADS or not {*TASK_HEADS[task]}.isdisjoint(named)):
        config["task_type"] = task
    config[OPTION] = dict(tables)
    init = options.get("init_lora_weights", True)
    config["init_lora_weights"] = init if isinstance(init, (bool, str)) and init in OUR_INITS else True
    if variant != PLAIN:
        own = {name: options[name] for name in KNOWN_VARIANTS[variant].own_options if name in options}
        config |= {"variant": variant, "variant_options": own}
    return LoRAConfig(**{"target_modules": layers, **config})


def origin_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return what PEFT's options say of the base."""
    return {name: options[name] for name in ORIGIN if isinstance(options.get(name), str)}


def check_peft_version(version: object, where: object) -> None:
    """Raise LoRAError for an attention adapter of a later peft than is known, which may add out_proj's change once."""
    numbers = [int(part) if part.isdigit() else 0 for part in str(version or "0.0").split(".")[:2]]
    if tuple(numbers) > LAST_KNOWN_PEFT:
        raise LoRAError(
            f"{where}: adapts nn.MultiheadAttention and was written by peft {version}. peft up to 0.21 adds the change "
            "of out_proj twice; whether this one does is not known here. Update lightning_lora, or leave attention out."
        )


def as_plain(adapter: Adapter) -> Adapter:
    """Return the equal adapter without enable_lora, as PEFT applies it."""
    plain = _with_factors_b(adapter, lambda name, a, b, enabled: to_block_diagonal(b, enabled), 1 / OUT_PROJ_COUNTS)
    return turn(plain)


def from_plain(adapter: Adapter) -> Adapter:
    """Undo as_plain. Raises LoRAError where a B is not zero outside its blocks, which enable_lora cannot express."""
    return _with_factors_b(turn(adapter), _from_block_diagonal, OUT_PROJ_COUNTS)


def add_idle_attention(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """Return the equal adapter in which attention is adapted whole where its out_proj alone was, and what was added."""
    outputs = {name.rpartition(".")[0]: name for name, kind in adapter.kinds.items() if kind == ATTENTION_OUTPUT}
    added = [name for name in outputs if name not in adapter.kinds]
    tensors = dict(adapter.tensors)
    for name in added:
        stored, (a, b, _) = adapter.stored(outputs[name]), adapter.acting(outputs[name])
        shapes = {IN_PROJ: torch.Size((3 * b.shape[0], a.shape[1]))}
        place = replace(adapter.place(outputs[name]), name=name, kind=ATTENTION, shapes=shapes)
        place = replace(place, rank=adapter.variant.rank(stored))
        zeros = {leaf: stored[leaf].new_zeros(shape) for leaf, shape in adapter.variant.shapes(place).items()}
        tensors |= {f"{name}.{leaf}": zero for leaf, zero in zeros.items()}
    scalings = {name: adapter.scalings[outputs[name]] for name in added}
    kinds = dict.fromkeys(added, ATTENTION)
    new = replace(adapter, tensors=tensors, scalings={**adapter.scalings, **scalings}, kinds={**adapter.kinds, **kinds})
    return new, added


def idle_attention(adapter: Adapter) -> list[str]:
    """Return the attention whose factors are all zero, as add_idle_attention adds them."""
    attention = {name: adapter.stored(name) for name, kind in adapter.kinds.items() if kind == ATTENTION}
    return [name for name, stored in attention.items() if stored and all(map(_is_zero, stored.values()))]


def _is_zero(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.any()


def _with_factors_b(adapter: Adapter, for_parts: Callable[..., torch.Tensor], for_output: float) -> Adapter:
    tensors = dict(adapter.tensors)
    for name in adapter.layers():
        enabled = adapter.config.enabled_parts(name) if adapter.config is not None else None
        key = f"{name}.{B}"
        if adapter.kinds.get(name) == ATTENTION_OUTPUT:
            tensors[key] = tensors[key].detach() * for_output
        elif enabled is not None:
            tensors[key] = for_parts(name, tensors[f"{name}.{A}"], tensors[key], enabled)
    return replace(adapter, tensors=tensors)


def _from_block_diagonal(name: str, a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    if (
        not a.dim() == b.dim() == 2
        or a.shape[0] != b.shape[1]
        or b.shape[1] % sum(enabled)
        or b.shape[0] % len(enabled)
    ):
        raise LoRAError(
            f"adapter: {name!r}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit enable_lora={list(enabled)}."
        )
    narrow = from_block_diagonal(b, enabled)
    if not torch.equal(to_block_diagonal(narrow, enabled), b):
        raise LoRAError(
            f"adapter: {name!r}: its B is not zero outside the blocks of enable_lora={list(enabled)}; something else "
            "changed it after it was saved."
        )
    return narrow
