"""Names of modules and tensors, and this package's keys on models and in checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

# Parameters of an adapted layer. Those of an adapted single parameter `w` are lora_A_w and lora_B_w in w's module.
A, B = "lora_A", "lora_B"
INJECTION_ATTRIBUTE = "lora_injection"  # attribute of the injected module: its Injection
MERGED_FOR_GOOD = "merged_after_fit"  # attribute of a LightningModule that a fit merged, until it is fitted again
META = "lora"  # key of an adapter's metadata in a checkpoint
# Segments that torch.compile, checkpoint_wrapper and FSDP1 add to names.
COMPILED, CHECKPOINTED, FLATTENED = WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

NAMELESS = "layers"  # the group of layers whose names consist of numbers
NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")  # a segment of a name

LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")  # packages

PREFIX = "lora_"  # the beginning of the leaf name (the last segment) of each tensor of an adapter
LEAVES: set[str] = set()  # the leaf names of all known variants; for a single parameter a suffix follows them

# Objects of nn/variant.py's class by the value of LoRAConfig(variant=...). A class adds its object when it is defined.
# The type is Any because nn/variant.py imports this file.
KNOWN_VARIANTS: dict[str, Any] = {}

Value = TypeVar("Value")


def variant_of_peft(peft_type: object) -> Any:
    """Return the variant that a peft_type of PEFT means by itself, or None for an unknown one.

    Of several with that peft_type it is the one that the others derive from: "LORA" is LoRA, and what another option
    asks for in addition makes another variant of it.
    """
    found = [each for each in KNOWN_VARIANTS.values() if peft_type and each.peft_type == peft_type]
    return next((each for each in found if all(isinstance(other, type(each)) for other in found)), None)


def canonical(name: str) -> str:
    """Return a module or state name without the segments that wrappers add."""
    if COMPILED not in name and CHECKPOINTED not in name and FLATTENED not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def join_names(outer: str, inner: str) -> str:
    """Join a module's name and a name inside of it by a dot. Either may be "", which is the module itself."""
    return f"{outer}.{inner}" if outer and inner else outer or inner


def suffixes(name: str) -> list[str]:
    """Return a name and all its dotted suffixes, longest first: a.b.c, b.c, c."""
    return [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]


def parent_names(name: str) -> list[str]:
    """Return the names of the modules that hold a parameter or module, outermost first: a, a.b for a.b.c."""
    return [name[:i] for i, character in enumerate(name) if character == "."]


def names_factor(name: str) -> bool:
    """Return whether a name belongs to an adapter's tensor: its last segment is a leaf name of a known variant."""
    return split_factor_name(name) is not None


def split_factor_name(name: str) -> tuple[str, str] | None:
    """Split the name of an adapter's tensor into the adapted layer or single parameter, and the tensor's leaf name.

    "net.lora_A" gives ("net", "lora_A"), and "net.lora_A_w" gives ("net.w", "lora_A"). Other names give None.
    """
    path, dot, last = name.rpartition(".")
    if last in LEAVES:
        return path, last
    if not last.startswith(PREFIX):
        return None
    leaf = max((leaf for leaf in LEAVES if last.startswith(f"{leaf}_")), key=len, default=None)
    return None if leaf is None else (path + dot + last.removeprefix(f"{leaf}_"), leaf)


def parameter_factor_name(parameter: str, leaf: str) -> str:
    """Return the name of an adapter's tensor for a single parameter, in the module of the parameter."""
    return f"{leaf}_{parameter}"


def factor_role(name: str) -> str:
    """Return the role of an adapter's tensor, such as "A", "B" or "rows": its leaf name without "lora_"."""
    split = split_factor_name(name)
    leaf = split[1] if split else name.rpartition(".")[2]
    return leaf.removeprefix(PREFIX)


def group_of(name: str) -> str:
    """Return the group of an adapted layer, by which the summary, the loggers and the pictures all call it.

    It is the part of the layer's name behind its last number, as in "attention.output.dense", or before that number if
    the name ends there. Names of numbers alone are the group "layers", and the model itself is "model". MLflow and file
    systems take these names.
    """
    parts = [part.strip(".") for part in NUMBER.split(name)]
    return next(filter(None, reversed(parts)), NAMELESS if name else "model")


def cut_at_left(name: str, longest: int) -> str:
    """Return a name of at most `longest` characters, without its beginning if it is longer: its end tells most."""
    return name if len(name) <= longest else f"...{name[len(name) - longest + 3 :]}"


def derives_from(module: object, name: str, packages: Collection[str]) -> bool:
    """Return whether an object's class derives from a class of this name in one of the packages; imports nothing."""
    classes = ((cls.__name__, cls.__module__.partition(".")[0]) for cls in type(module).__mro__)
    return any(own == name and package in packages for own, package in classes)


def is_lightning_module(model: object) -> bool:
    """Return whether a module is a LightningModule of either of Lightning's packages."""
    return derives_from(model, "LightningModule", LIGHTNING)


def rename_keys(values: Mapping[str, Value], new_name: Callable[[str], str | None]) -> dict[str, Value]:
    """Return values under new names, without those whose new name is None."""
    pairs = ((new_name(name), value) for name, value in values.items())
    return {name: value for name, value in pairs if name is not None}


def listed(texts: Sequence[str], most: int = 3) -> str:
    """Return the first `most` texts joined by commas, with "..." at the end where there are more."""
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")
