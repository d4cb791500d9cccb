"""Names of modules and tensors, and this package's keys on models and in checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# Parameters of an adapted layer. Those of an adapted single parameter `w` are lora_A_w and lora_B_w in w's module.
A, B = "lora_A", "lora_B"
ATTRIBUTE = "lora_injection"  # attribute of the injected module: the record of its injection
KEPT = "lora_kept"  # attribute of modules of an injected model: what the record keeps of the module
MERGED_FOR_GOOD = "merged_after_fit"  # attribute of a LightningModule that a fit merged, until it is fitted again
META = "lora"  # key of an adapter's metadata in a checkpoint
# Segments that torch.compile, checkpoint_wrapper and FSDP1 add to names.
COMPILED, CHECKPOINTED, FLATTENED = WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

ANY_NUMBER = "N"  # what stands for a number in the name of a group
NAMELESS = "layers"  # the group of layers whose names consist of numbers
WORD = re.compile(r"[^._]+[._]?|[._]")  # a word of a name, with what parts it from the next one

LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")  # packages

PREFIX = "lora_"  # the beginning of the leaf name (the last segment) of each tensor of an adapter
LEAVES: set[str] = set()  # the leaf names of all known variants; for a single parameter a suffix follows them

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


def group_names(names: Iterable[str]) -> dict[str, str]:
    """Return the group of each adapted layer, by which the summary, the loggers and the pictures all call it.

    It is the last segment of the layer's name, with N for each number after that segment. MLflow and file systems take
    these names. Layers of one numbered block, such as the four called `dense` in BERT, are in different groups if their
    names differ in more than numbers. Their groups have as many segments before the last one as tell them apart. Names
    of numbers alone are the group "layers", and the model itself is "model".
    """
    places = {name: _place_in_block(name) for name in names}
    tails: dict[str, set[str]] = {}  # by last segment: the names in their blocks of all layers with that segment
    in_block: dict[tuple[str, str], set[str]] = {}
    for block, tail, ending in places.values():
        tails.setdefault(ending, set()).add(tail)
        if block:
            in_block.setdefault((block, ending), set()).add(tail)
    beside: dict[str, set[str]] = {}  # by name in the block: the others with its last segment in a block of it
    for of_block in in_block.values():
        for tail in of_block:
            beside.setdefault(tail, set()).update(of_block - {tail})
    ambiguous = {ending for (_, ending), of_block in in_block.items() if len(of_block) > 1}
    return {
        name: _shortest_suffix(tail, tails[ending], beside.get(tail, set())) if ending in ambiguous else ending
        for name, (_, tail, ending) in places.items()
    }


def _place_in_block(name: str) -> tuple[str, str, str]:
    """Return the outermost numbered block of a layer ("" for none), the layer's name in it, and its last segment."""
    segments = name.split(".") if name else ["model"]
    last = last_word(segments)
    if segments[last].isdigit():
        return "", NAMELESS, NAMELESS
    begin = next((i + 1 for i, segment in enumerate(segments[:last]) if segment.isdigit()), 0)
    tail = [ANY_NUMBER if segment.isdigit() else segment for segment in segments[begin:]]
    return ".".join(segments[:begin]), ".".join(tail), ".".join(tail[last - begin :])


def last_word(segments: Sequence[str]) -> int:
    """Return the index of the last segment that is no number, or 0."""
    return next((i for i in reversed(range(len(segments))) if not segments[i].isdigit()), 0)


def _shortest_suffix(name: str, names: Iterable[str], beside: Collection[str]) -> str:
    """Return the shortest dotted suffix that begins with a word and that no other of the names has, or else the name.

    A name that ends like another one is no other name, unless it stands beside it in a block.
    """
    own = suffixes(name)
    others = {
        suffix
        for other in names
        if other in beside or not (other in own or name in suffixes(other))
        for suffix in suffixes(other)
    }
    words = (each for each in reversed(own) if each not in others and not each.startswith(f"{ANY_NUMBER}."))
    return next(words, name)


def short_names(names: Sequence[str], longest: int) -> list[str]:
    """Return names of at most `longest` characters where that is possible; all as they are if they fit.

    Names that are too long lose, in this order: the words that all begin with, the words that all end with, and their
    beginnings, because the end of a name tells most. Names that differ still differ.
    """
    if max(map(len, names), default=0) <= longest:
        return list(names)
    words = [WORD.findall(name) for name in names]
    words = _without_common(words)
    if max(len("".join(each)) for each in words) > longest:
        words = [each[::-1] for each in _without_common([each[::-1] for each in words])]
    whole = ["".join(each).strip("._") or name for each, name in zip(words, names, strict=True)]
    cut = [text if len(text) <= longest else f"...{text[len(text) - longest + 3 :]}" for text in whole]
    return cut if len(set(cut)) == len(set(names)) else short_names(names, longest + 8)


def _without_common(names: Sequence[list[str]]) -> list[list[str]]:
    """Return lists of words without the words that all begin with; at least one word of each stays."""
    if len(set(map(tuple, names))) < 2:
        return list(names)
    most = min(map(len, names)) - 1
    common = next((i for i in range(most) if len({name[i] for name in names}) > 1), most)
    return [name[common:] for name in names]


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
