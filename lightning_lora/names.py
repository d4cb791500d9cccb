"""Names of modules and tensors, and this package's keys on models and in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# Parameters of an adapted layer. Those of an adapted single parameter `w` are lora_A_w and lora_B_w in w's module.
A, B = "lora_A", "lora_B"
ATTRIBUTE = "lora_injection"  # attribute of the injected module: the record of its injection
KEPT = "lora_kept"  # attribute of modules of an injected model: what the record keeps of the module
META = "lora"  # key of an adapter's metadata in a checkpoint
ENTRY = "lora_learned"  # key of the record's content in a state dict
# Segments that torch.compile, checkpoint_wrapper and FSDP1 add to names.
COMPILED, CHECKPOINTED, FLATTENED = WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")  # packages

PREFIX = "lora_"  # the beginning of the leaf name (the last segment) of each tensor of an adapter
_ROLES: dict[str, str] = {}  # the role of each registered leaf name; each variant's file registers the variant's
_LONGEST_FIRST: list[str] = []  # the registered leaf names

# Objects of nn/variant.py's class by the value of LoRAConfig(variant=...). Each variant's file adds its variant.
KNOWN_VARIANTS: dict[str, Any] = {}

Value = TypeVar("Value")


def canonical(name: str) -> str:
    """Return a module or state name without the segments that wrappers add."""
    if COMPILED not in name and CHECKPOINTED not in name and FLATTENED not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def suffixes(name: str) -> list[str]:
    """Return a name and all its dotted suffixes, longest first: a.b.c, b.c, c."""
    return [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]


def parent_names(name: str) -> list[str]:
    """Return the names of the modules that hold a parameter or module, outermost first: a, a.b for a.b.c."""
    return [name[:i] for i, character in enumerate(name) if character == "."]


def register_leaf(leaf: str, role: str) -> None:
    """Register the leaf name of an adapter's tensor. For a single parameter a suffix follows the leaf name.

    Args:
        leaf: the name in the module of the weight, such as "lora_A".
        role: of the tensor in the adapter, such as "A". Statistics and param groups use it.

    Raises:
        ValueError: the name does not begin with "lora_", or is registered with another role.
    """
    if not leaf.startswith(PREFIX):
        raise ValueError(f"{leaf!r} must begin with {PREFIX!r}")
    if _ROLES.setdefault(leaf, role) != role:
        raise ValueError(f"{leaf!r} is known already, as {_ROLES[leaf]!r}")
    _LONGEST_FIRST[:] = sorted(_ROLES, key=len, reverse=True)


def names_factor(name: str) -> bool:
    """Return whether a name belongs to an adapter's tensor: its last segment is a registered leaf name."""
    return split_factor_name(name) is not None


def split_factor_name(name: str) -> tuple[str, str] | None:
    """Split the name of an adapter's tensor into the adapted layer or single parameter, and the tensor's leaf name.

    "net.lora_A" gives ("net", "lora_A"), and "net.lora_A_w" gives ("net.w", "lora_A"). Other names give None.
    """
    path, dot, last = name.rpartition(".")
    if last in _ROLES:
        return path, last
    if not last.startswith(PREFIX):
        return None
    leaf = next((leaf for leaf in _LONGEST_FIRST if last.startswith(f"{leaf}_")), None)
    return None if leaf is None else (path + dot + last.removeprefix(f"{leaf}_"), leaf)


def parameter_factor_name(parameter: str, leaf: str) -> str:
    """Return the name of an adapter's tensor for a single parameter, in the module of the parameter."""
    return f"{leaf}_{parameter}"


def factor_role(name: str) -> str:
    """Return the role of an adapter's tensor in the adapter: "A", "B", "rows", or a role of its variant."""
    split = split_factor_name(name)
    leaf = split[1] if split else name.rpartition(".")[2]
    return _ROLES.get(leaf) or leaf.removeprefix(PREFIX)


def group_names(names: Iterable[str]) -> dict[str, str]:
    """Return the group of each adapted layer: the last segment of its name, with * for numbers after that segment.

    A numbered block may hold several layers with the same last segment, such as the four called `dense` in BERT. Their
    groups have as many segments before the last one as tell them apart.
    """
    places = {name: _place_in_block(name) for name in names}
    tails: dict[str, set[str]] = {}  # by last segment: the names in their blocks of all layers with that segment
    in_block: dict[tuple[str, str], set[str]] = {}
    for block, tail, ending in places.values():
        tails.setdefault(ending, set()).add(tail)
        in_block.setdefault((block, ending), set()).add(tail)
    ambiguous = {ending for (block, ending), of_block in in_block.items() if block and len(of_block) > 1}
    return {
        name: _shortest_unique_suffix(tail, tails[ending]) if ending in ambiguous else ending
        for name, (_, tail, ending) in places.items()
    }


def _place_in_block(name: str) -> tuple[str, str, str]:
    """Return the innermost numbered block of a layer ("" for none), the layer's name in it, and its last segment."""
    segments, last = name.split("."), len(name.split(".")) - 1
    while last > 0 and segments[last].isdigit():
        last -= 1
    ending = ["*" if segment.isdigit() else segment or "(the model)" for segment in segments[last:]]
    begin = max((i + 1 for i, segment in enumerate(segments[:last]) if segment.isdigit()), default=0)
    return ".".join(segments[:begin]), ".".join([*segments[begin:last], *ending]), ".".join(ending)


def _shortest_unique_suffix(name: str, names: Collection[str]) -> str:
    """Return the shortest dotted suffix of a name that no other name has, or else the name."""
    others = {suffix for other in names if other != name for suffix in suffixes(other)}
    return next((suffix for suffix in reversed(suffixes(name)) if suffix not in others), name)


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
