"""Whether an adapter fits a model: layers, kinds, tables, names, shapes and ties. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.values import check_finite, describe_value
from ..config import LoRAConfig
from ..distributed.flat import unsharded_shape
from ..distributed.sharding import is_spread
from ..errors import LoRAError, sentence
from ..formats.peft_rows import NO_BIAS
from ..matching import matcher, near_misses
from ..model.adapted_model import AdaptedModel
from ..model.injection import Chosen
from ..model.live_state import LiveState
from ..model.pretrained import embeddings, pretrained_models
from ..names import listed, names_factor, parent_names, rename_keys
from ..nn.adapted_module import adapted_places
from ..nn.adapted_weights import AdaptedWeights, LayerSpec
from ..nn.foreign_linear import is_foreign_linear
from ..nn.tied_weights import untie_advice
from ..nn.variant import rows_leaf
from ..private.deepspeed import keeps_copy
from .first_names import Names, by_first_names
from .resized_tables import refuse_other_rows

OTHER_OPTIONS = "Call unload(model) first, so that load_adapter injects with the adapter's options."
Specs = Mapping[AdaptedWeights, LayerSpec]  # the new rank and scaling of each layer that changes


def specs_for(handle: AdaptedModel, adapter: Adapter) -> Specs:
    """Return new options for each layer whose rank or scaling is another in the adapter than in the model.

    Args:
        handle: an injected model.
        adapter: under first names. Where it has no options, the model's hold.

    Raises:
        LoRAError: a layer that is sharded, or that DeepSpeed trains, would get another rank.
    """
    if adapter.config is None:
        return {}
    specs = {}
    for name in filter(adapter.layers.__contains__, handle.kinds):
        layer, given, spec = handle.layers[name], adapter.layers[name], handle.layers[name].lora.spec
        rank, scaling = given.r, spec.scaling if given.scaling is None else given.scaling
        factor = layer.trained_tensors()[0]
        if rank != spec.r and (is_spread(factor) or keeps_copy(factor)):
            how = "is sharded" if is_spread(factor) else "is trained by DeepSpeed"
            raise LoRAError(f"adapter: {name!r} {how}, and has rank {spec.r}, the adapter {rank}: load it before that.")
        if rank != spec.r or not math.isclose(scaling, spec.scaling) or given.parts != spec.enabled:
            alpha = adapter.config.alpha_of(rank, scaling)
            specs[layer] = replace(spec, r=rank, scaling=scaling, alpha=alpha, enabled=given.parts)
    return specs


def check_adapter(
    live: LiveState,
    names: Names,
    adapter: Adapter,
    *,
    specs: Specs | None = None,
    remedy: str = OTHER_OPTIONS,
) -> None:
    """Raise LoRAError for the first layer, scaling, name, shape or value that does not fit the model.

    The base is compared by check_fingerprint.

    Args:
        live: an injected model.
        names: of its modules.
        adapter: under these names.
        specs: the new options of layers, from specs_for.
        remedy: the advice at the end of the error where the adapter has other options than the model.
    """
    specs = specs or {}
    try:
        _check_layers(live.handle, by_first_names(names, adapter), specs)
        _check_tables(live.handle, adapter)
        _check_tensors(live, names, adapter, specs)
        _check_trained(live, adapter)
    except _OtherShapeError as error:  # no option explains it
        raise LoRAError(str(error)) from None
    except LoRAError as error:
        config = live.handle.injection.config
        differences = (adapter.config or config).differences(config)  # may explain the error
        advice = f" The options differ: {'; '.join(differences)}. {remedy}" if differences else ""
        raise LoRAError(f"{error}{advice}") from None


def _check_layers(handle: AdaptedModel, adapter: Adapter, specs: Specs) -> None:
    layers, kinds = handle.layers, handle.kinds
    _check_names("layer", adapter.layers, kinds)
    for name in kinds:
        layer = layers[name]
        given, spec = adapter.layers[name], specs.get(layer, layer.lora.spec)
        scaling, kind = given.scaling, given.kind
        if scaling is not None and not math.isclose(scaling, spec.scaling):
            raise LoRAError(
                f"adapter: layer {name!r} was trained with a scaling (lora_alpha over r) of {scaling:g}, but the model "
                f"was injected with {spec.scaling:g}; use the adapter's own options."
            )
        if adapter.config is not None and given.parts != spec.enabled:
            raise LoRAError(
                f"adapter: of layer {name!r} the parts {given.parts} were adapted, and here enable_lora says "
                f"{spec.enabled}; use the adapter's own options."
            )
        if kind not in ("", kinds[name]):  # a square weight fits a layer that stores its transpose too
            raise LoRAError(
                f"adapter: layer {name!r} was a {kind} layer where the adapter was trained, here it is {kinds[name]}; "
                "the adapter belongs to another model."
            )


def _check_tables(handle: AdaptedModel, adapter: Adapter) -> None:
    if not adapter.tables:
        return
    live = {}
    for name, module, layer in adapted_places(handle.model, modules=handle.places):
        live[name] = layer.replaced_rows()
        if adapter.peft_version is not None and live[name] and getattr(module, "bias", None) is not None:
            raise LoRAError(f"adapter: {name!r} has trained rows and a bias; {NO_BIAS}.")
    for name, rows in adapter.tables.items():
        if live.get(name, rows) != rows:
            raise LoRAError(
                f"adapter: of {name!r} the rows {listed(list(map(str, rows)), 8)} were trained, and here the options "
                f"name {listed(list(map(str, live[name])), 8)}; use the adapter's own options."
            )


def _check_tensors(live: LiveState, names: Names, adapter: Adapter, specs: Specs) -> None:
    shapes = {id(factor): torch.Size(shape) for layer, spec in specs.items() for factor, shape in layer.shapes_by(spec)}
    expected = dict.fromkeys(
        name
        for name in live.changing
        if isinstance(live.tensors[name], nn.Parameter) or (adapter.complete and name.startswith(adapter.scope))
        if live.tensors[name] is not None or name in adapter.tensors or not is_foreign_linear(live.owners[name])
    )
    _check_ties(live, names, adapter.tensors, expected)
    compared = (name for name in adapter.tensors if name not in live.tensors or name in expected)
    _check_names("tensor", map(names.first, compared), map(names.first, expected))
    networks = pretrained_models(live.handle.modules).values()
    tables = {id(weight) for network in networks for weight in embeddings(network)}
    for name, value in adapter.tensors.items():
        tensor = live.tensors[name]
        if tensor is None:
            continue  # extra state: its owner checks it
        lacks_values = isinstance(value, torch.Tensor) and value.is_meta > tensor.is_meta
        if lacks_values or (isinstance(value, torch.Tensor) and value.layout != tensor.layout):
            raise LoRAError(f"adapter: {name!r} must be a tensor as the model's, found {describe_value(value)}.")
        if id(tensor) in tables and isinstance(value, torch.Tensor):
            refuse_other_rows(name, value.shape, unsharded_shape(tensor))
        shape = shapes.get(id(tensor), unsharded_shape(tensor))
        if isinstance(value, torch.Tensor) and value.shape != shape:
            _refuse_shape(live, adapter, name, shape, specs)
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            shown = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise LoRAError(f"adapter: {name!r} must have shape {tuple(shape)}, but has {shown}.")
        if value.is_floating_point() != tensor.is_floating_point():
            raise LoRAError(f"adapter: {name!r} must be {tensor.dtype}, but is {value.dtype}.")
        if value.is_floating_point() and isinstance(tensor, nn.Parameter) and not names_factor(name):
            check_finite(name, value)  # factors have been checked where they were read


class _OtherShapeError(LoRAError):
    """A tensor has another shape in the model, and no option of the adapter is the reason."""


def _refuse_shape(live: LiveState, adapter: Adapter, name: str, shape: torch.Size, specs: Specs) -> None:
    """Raise LoRAError where a tensor's shape tells another base or another head, and not another rank."""
    value, owner = adapter.tensors[name], name.rpartition(".")[0]
    found = f"{name!r} must have shape {tuple(shape)}, but has {tuple(value.shape)}"
    if names_factor(name):
        layer = live.handle.layers_by_every_name.get(owner)
        trained = adapter.layers.get(owner)
        if layer is None or trained is None or trained.r != specs.get(layer, layer.lora.spec).r:
            return
        base = adapter.origin.get("base_model_name_or_path")
        raise _OtherShapeError(
            f"adapter: belongs to another base, of another width: {found}. Load it onto the base that it was trained "
            f"on{f', {base!r}' if base else ''}."
        )
    if adapter.config is not None and _trains_whole(adapter.config, name, adapter.layers):
        raise _OtherShapeError(
            f"adapter: {owner!r} was fully trained with another size: {found}. "
            f"{_new_module(live, adapter, owner)}, and then load the adapter."
        )


def _new_module(live: LiveState, adapter: Adapter, owner: str) -> str:
    """Return the advice to put a module of the adapter's size into a model, with the line where it is known."""
    module = dict(live.handle.places).get(owner)
    weight = adapter.tensors.get(f"{owner}.weight")
    if isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        rows, columns = weight.shape
        bias = "" if f"{owner}.bias" in adapter.tensors else ", bias=False"
        new = f"nn.Linear({columns}, {rows}{bias})"
        is_path = all(map(str.isidentifier, owner.split(".")))
        line = f"model.{owner} = {new}" if is_path else f"model.set_submodule({owner!r}, {new})"
        return f"Put a new one there first, {line}"
    return f"Put a module of that size at {owner!r} first, built as where the adapter was trained"


def _check_trained(live: LiveState, adapter: Adapter) -> None:
    """Raise where a parameter that the adapter's options train whole is frozen in the model, and would stay so.

    What they do not name was unfrozen later, and is loaded into a parameter that stays as it is.
    """
    trained, config = set(live.changing), adapter.config
    if config is None:
        return
    others = {name: live.tensors[name] for name in adapter.whole_tensors() if name not in trained}
    frozen = [name for name, p in others.items() if isinstance(p, nn.Parameter) and p.is_floating_point()]
    named = [name for name in frozen if _trains_whole(config, name, adapter.layers)]
    if named:  # check_adapter tells how the options differ
        raise LoRAError(f"adapter: {named[0]!r} was fully trained, but is frozen in this model.")


def chosen_by(adapter: Adapter) -> Chosen:
    """Return the layers of an adapter with options, and the parameters that it trains whole.

    Its options say that. What else it holds was unfrozen later, or belongs to a resized table, and stays frozen.
    """
    config = cast(LoRAConfig, adapter.config)
    whole = frozenset(name for name in adapter.whole_tensors() if _trains_whole(config, name, adapter.layers))
    return Chosen(adapter.layers, adapter.tables, whole, adapter.scope)


def _trains_whole(config: LoRAConfig, name: str, layers: Collection[str]) -> bool:
    """Return whether options name a base parameter as one that is fully trained."""
    owner, _, leaf = name.rpartition(".")
    is_bias = leaf == "bias" and (config.bias == "all" or (config.bias == "lora_only" and owner in layers))
    return is_bias or any(map(matcher(config.all_modules_to_save()), parent_names(name)))


def _check_ties(live: LiveState, names: Names, tensors: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise where tied tensors of the model have different values in the adapter, or only one of them has a value.

    PEFT trains a copy of one end of a tie, or one copy of each.
    """
    by_tensor: dict[int, dict[str, None]] = {}
    for name in expected:
        if live.tensors[name] is not None:
            by_tensor.setdefault(id(live.tensors[name]), {})[names.first(name)] = None
    several = [list(same) for same in by_tensor.values() if len(same) > 1]
    stored = rename_keys(tensors, names.first) if several else {}
    for first, *others in several:
        values = {name: stored[name] for name in (first, *others) if name in stored}
        for other in others if values else ():
            if other not in values or first not in values or not _equal(values[first], values[other]):
                raise LoRAError(
                    f"adapter: {first!r} and {other!r} are one tensor in the model, but were trained apart: the "
                    f"adapter holds {'two values' if len(values) > 1 else 'a value for one of them alone'}. "
                    f"{untie_advice(_weight_name(other))}."
                )


def _weight_name(name: str) -> str:
    """Return the name of the weight that trained rows belong to; any other name stays."""
    table, _, leaf = name.rpartition(".")
    return f"{table}.weight" if leaf == rows_leaf() else name


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)) or one.is_meta:
        return True  # without values there is nothing to compare
    return torch.equal(one, other)


def _check_names(what: str, names: Iterable[str], expected: Iterable[str]) -> None:
    names, expected = list(names), list(expected)
    missing, unexpected = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or unexpected:
        if missing:
            first, hint = f"{missing[0]!r} is missing", near_misses(missing[0], names)
        else:
            first, hint = f"{unexpected[0]!r} has no place in the model", near_misses(unexpected[0], expected)
        found = sentence(f"{first} (in all {len(missing)} missing, {len(unexpected)} unexpected){hint}")
        raise LoRAError(f"adapter: {what} {found} The adapter was saved from a model with other layers or options.")
