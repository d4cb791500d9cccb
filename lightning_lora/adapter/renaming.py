"""Rename the tensors and layers of an adapter, as a model that loads it names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import torch

from ..config import LoRAConfig
from ..errors import LoRAError, sentence
from ..matching import near_misses
from ..names import parent_names, suffixes
from ..notices import warn
from .adapter import Adapter, NewName, is_head_only, nothing_adapted


def renamed(adapter: Adapter, strip: str, add: str) -> Adapter:
    """Return an adapter with the prefix `strip` taken off every name and the prefix `add` put in front.

    Tensors whose names lack the prefix are left out.
    """

    def new_name(name: str) -> str | None:
        return add + name.removeprefix(strip) if name.startswith(strip) else None

    return replace(renamed_by(adapter, new_name), network="")


def renamed_by(adapter: Adapter, new_name: NewName) -> Adapter:
    """Return an adapter with new names, as with_names does, and with modules_to_save that names the same modules."""
    pretrained = (new_name(adapter.pretrained) or "") if adapter.pretrained else ""
    new = replace(adapter.with_names(new_name), scope=new_name(adapter.scope) or "", pretrained=pretrained)
    return replace(new, config=_with_names_of_saved(new))


def by_network_names(adapter: Adapter) -> Adapter:
    """Return an adapter under the network's own names, without tensors outside of the network."""
    return renamed(adapter, adapter.network, "") if adapter.network else adapter


def _with_names_of_saved(adapter: Adapter) -> LoRAConfig | None:
    """Return the options. An entry of modules_to_save that names nothing any more loses the prefix that names lost."""
    config = adapter.config
    if config is None or not config.modules_to_save:
        return config
    modules = {module for name in adapter.tensors for module in parent_names(name)}
    named = {suffix for module in modules for suffix in suffixes(module)}
    saved = [
        entry if entry in named else next((tail for tail in suffixes(entry) if tail in modules), entry)
        for entry in config.modules_to_save
    ]
    return replace(config, modules_to_save=saved)


def align_to_modules(
    adapter: Adapter, modules: Set[str], where: str, first: Callable[[str], str] = str, *, of_files: str = ""
) -> Adapter:
    """Return the adapter under the one prefix at which its layers, or else its tensors' modules, are among the modules.

    Args:
        adapter: under any prefix, perhaps with a network that was saved under several names.
        modules: names of the model's modules.
        where: for messages.
        first: gives the first name of a module that has several. Prefixes that lead to the same modules are one.
        of_files: for weights on disk, the advice where tensors of the adapter lie outside of them, which is an error
            then. A model in memory leaves them out, with a warning.

    Raises:
        LoRAError: there is no such prefix, or there are several.
    """
    form: Adapter | None = adapter
    while form is not None:
        adapter = form
        layers = _placed(adapter)
        if not layers and not is_head_only(adapter):
            raise LoRAError(
                f"adapter: the source holds {nothing_adapted(adapter)}; it is not an adapter of a known format."
            )
        if all(layer in modules for layer in layers):
            return adapter
        prefixes = _fitting_prefixes(layers, modules, first)
        if len(prefixes) == 1:
            return _under_prefix(adapter, *prefixes[0], where, of_files)
        form = _simpler(adapter, fits=bool(prefixes))
    fitting = ", ".join(repr(add or f"without {strip}") for strip, add in prefixes) or "none"
    unplaced = next(layer for layer in layers if layer not in modules)
    found = sentence(f"found {fitting}{near_misses(unplaced, sorted(modules - {''}))}")
    raise LoRAError(
        f"adapter: its layers ({unplaced!r}, ...) must fit {where} under exactly one prefix; {found}"
        + ("" if of_files else " Pass the submodule that the adapter is for.")
    )


def _simpler(adapter: Adapter, *, fits: bool) -> Adapter | None:
    """Return the adapter under the network's own names, or without what it holds a second time; None where it is so.

    What fits under several prefixes keeps its second names: to leave them out would not make it fit under one.
    """
    form = by_network_names(adapter)
    if form is adapter and not fits:
        form = _without_second_name(adapter)
    return None if form is adapter else form


def _under_prefix(adapter: Adapter, strip: str, add: str, where: str, of_files: str) -> Adapter:
    """Return the adapter with other beginnings of names. Leave out what lies outside, with a warning or an error."""
    # Base tensors of PEFT's count too, because nobody says whether they were trained; ours says what is frozen.
    told = (*adapter.tensors, *(adapter.base if adapter.peft_version is not None else ()))
    outside = [name for name in told if not name.startswith(strip)]
    if outside and strip != adapter.network:  # a network alone needs no tensors of the module around it
        lie_outside = f"{len(outside)} of the adapter's tensors lie outside {where}"
        if of_files:
            raise LoRAError(f"adapter: {lie_outside}, first {outside[0]!r}. {of_files}")
        warn(
            f"lightning_lora: {lie_outside} and are left out, first {outside[0]!r}. To keep them, load it into the "
            "whole model that was trained."
        )
    return renamed(adapter, strip, add)


def _placed(adapter: Adapter) -> list[str]:
    """Return the names that must be in a model: the layers, or, of an adapter without any, its tensors' modules."""
    if not is_head_only(adapter):
        return list(adapter.layers)
    return list(dict.fromkeys(owner for name in adapter.tensors if (owner := name.rpartition(".")[0])))


def _without_second_name(adapter: Adapter) -> Adapter:
    """Leave out what an adapter holds again, under a second name of a module, such as loss.model beside model.

    All layers under the second name must have the values of those under the other.
    """
    layers = list(adapter.layers)
    for other in layers[1:]:
        keep, drop = sorted(_different_beginnings(layers[0], other), key=bool)  # "" is the beginning of every name
        again = [layer for layer in layers if layer.startswith(drop)]
        if all(_are_equal(adapter, layer, keep + layer.removeprefix(drop)) for layer in again):
            return _under_one_name(adapter, keep, drop)
    return adapter


def _different_beginnings(one: str, other: str) -> tuple[str, str]:
    """Return what comes before the longest common dotted ending of two names."""
    ending = next((ending for ending in suffixes(one) if f".{other}".endswith(f".{ending}")), "")
    return one.removesuffix(ending), other.removesuffix(ending)


def _are_equal(adapter: Adapter, layer: str, other: str) -> bool:
    values, others = adapter.stored(layer), adapter.stored(other)
    if values.keys() != others.keys() or any(value.is_meta for value in values.values()):
        return False
    return all(
        value.device == others[leaf].device and torch.equal(value, others[leaf]) for leaf, value in values.items()
    )


def _under_one_name(adapter: Adapter, keep: str, drop: str) -> Adapter:
    """Leave out what begins with `drop` and is there with the beginning `keep` too."""
    known = {*adapter.tensors, *adapter.base, *adapter.fingerprint}

    def kept_name(name: str) -> str:
        return keep + name.removeprefix(drop) if name.startswith(drop) else name

    def new_name(name: str) -> str | None:
        return name if kept_name(name) == name or kept_name(name) not in known else None

    moved = replace(adapter, scope=kept_name(adapter.scope), pretrained=kept_name(adapter.pretrained))
    return renamed_by(moved, new_name)


def _fitting_prefixes(
    layers: Sequence[str], modules: Set[str], first_name: Callable[[str], str]
) -> list[tuple[str, str]]:
    """List each (prefix to strip, prefix to add) that makes every layer a module. One of the two is empty.

    Of those that lead to the same modules, one is listed.
    """
    segments = layers[0].split(".")
    strips = [".".join(segments[:i]) + "." for i in range(1, len(segments))]
    adds = sorted({module.removesuffix(layers[0]) for module in modules if module.endswith(f".{layers[0]}")})
    fitting = dict[tuple[str, ...], tuple[str, str]]()
    for strip, add in [*((strip, "") for strip in strips), *(("", add) for add in adds)]:
        rests = [f"{layer}.".removeprefix(strip) for layer in layers if f"{layer}.".startswith(strip)]
        places = [add + rest.removesuffix(".") for rest in rests]
        if len(places) == len(layers) and modules >= set(places):
            fitting.setdefault(tuple(map(first_name, places)), (strip, add))
    return list(fitting.values())
