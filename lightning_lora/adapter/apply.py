"""Fitting an adapter onto a model: base, names, shapes and layers are compared first, then the values are copied."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..distributed.sharding import copies_of, copy_all_, is_sharded
from ..errors import LoRAError
from ..matching import near_misses
from ..model.adapted_model import AdaptedModel, Listing
from ..model.live_state import LiveState, original_value
from ..model.merging import merge_listed
from ..model.pretrained import embeddings, pretrained_models
from ..model.targets import untie_advice, weights_of
from ..names import A, B, listed, names_factor, rename_keys
from ..nn.adapted_module import is_factor
from ..nn.adapted_weights import AdaptedWeights, LayerSpec, adapted_places
from ..nn.conv import LoRAConv
from .adapter import Adapter, check_finite, describe_value, options_hold, with_exact_ranks, without_aliases
from .fingerprint import EQUAL, without_base
from .peft_rows import NO_BIAS
from .pretrained_names import align_to_networks

Specs = Mapping[AdaptedWeights, LayerSpec]  # the new options of layers that change

log = logging.getLogger(__name__)


class Names:
    """The names of a model's modules: all of them, and the first name of each module, under which it is adapted."""

    def __init__(self, places: Iterable[tuple[str, nn.Module]]) -> None:
        """Take every module under every name."""
        self.modules: dict[str, nn.Module] = {}
        self.later: dict[str, str] = {}  # a module's later names, each with its first one
        first: dict[nn.Module, str] = {}
        for name, module in places:
            self.modules[name] = module
            if first.setdefault(module, name) != name:
                self.later[name] = first[module]

    def first(self, name: str) -> str:
        """Return the first name of what is called `name`, a module or a tensor."""
        if name in self.modules:
            return self.later.get(name, name)
        path, _, leaf = name.rpartition(".")
        return f"{self.later[path]}.{leaf}".lstrip(".") if path in self.later else name


def align_names(listing: Listing, names: Names, adapter: Adapter) -> Adapter:
    """Return the adapter under the one prefix at which its layers are modules of the model."""
    layers = adapter.layers()
    if layers and all(layer in names.modules for layer in layers):
        return adapter
    modules = {*names.modules, *(weights_of(names.modules) if adapter.parameters else ())}
    if layers and not modules.issuperset(layers):  # a later name of a shared module would make a second prefix
        ending = f".{layers[0]}"
        modules -= {n for n in modules if n.endswith(ending) and n.removesuffix(ending) in names.later}
    return align_to_networks(
        adapter, modules, type(listing.model).__name__, lambda: pretrained_models(listing.modules).values()
    )


def by_first_names(names: Names, adapter: Adapter) -> Adapter:
    """Rename layers to the first name of their module, under which it is adapted; a shared module has several names."""
    if not names.later:
        return adapter
    aliases = [name for name in adapter.layers() if names.first(name) != name]
    renamed = adapter.with_names(names.first)
    if not aliases or adapter.config is None:
        return renamed
    return replace(renamed, config=without_aliases(adapter.config, aliases))


def split_off_base(live: LiveState, adapter: Adapter) -> Adapter:
    """Replace base weights by a fingerprint, in a source that has weights of its base and no fingerprint.

    A whole state dict is such a source, and so is a PEFT folder with embeddings. Single base weights in an adapter's
    state dict stay: the user trained them. Embeddings with new rows stay too: they were resized.

    Raises:
        LoRAError: the embeddings of the model have another number of rows.
    """
    if adapter.fingerprint or adapter.complete or (adapter.config is not None and not adapter.perhaps_base):
        return adapter
    keys = set(live.keys) - live.handle.initial_of("resized").keys()
    base_keys = {name for name, _, owner in live.entries if not is_factor(name, owner)}
    whole = adapter.config is None and adapter.tensors.keys() >= base_keys
    candidates = adapter.tensors.keys() if whole else adapter.perhaps_base
    base = set()
    for name, tensor, owner in live.entries:
        if name not in candidates or name in keys or tensor is None:
            continue
        if name in adapter.perhaps_base and has_new_rows(
            name, adapter.tensors[name], original_value(name, tensor, owner)
        ):
            log.info("lightning_lora: %s comes with the adapter: its last rows are not the base's", name)
        else:
            base.add(name)
    return without_base(adapter, base)


def has_new_rows(name: str, stored: torch.Tensor, live: torch.Tensor) -> bool:
    """Tell whether a stored table equals the model's except for its last rows, and those are less than half.

    Raises:
        LoRAError: the two have different numbers of rows: one of them was resized.
    """
    if not is_sharded(live):
        _refuse_other_rows(name, stored, live)
    if stored.shape != live.shape or not stored.dim() or is_sharded(live) or live.is_meta:
        return False  # the fingerprint is compared instead
    relative = max(EQUAL, *(torch.finfo(tensor.dtype).eps for tensor in (stored, live)))
    rows = torch.isclose(stored.float(), live.float().cpu(), rtol=relative).reshape(len(stored), -1).all(1)
    same = int(rows.long().cumprod(0).sum())
    return len(rows) / 2 <= same < len(rows)


def _refuse_other_rows(name: str, stored: torch.Tensor, live: torch.Tensor) -> None:
    if stored.dim() and stored.shape[1:] == live.shape[1:] and len(stored) != len(live):
        raise LoRAError(
            f"adapter: {name!r} has {len(stored)} rows, in the model {len(live)}: one of the two was resized. Resize "
            f"the model first: model.resize_token_embeddings({len(stored)})."
        )


def add_frozen_weights(live: LiveState, adapter: Adapter) -> Adapter:
    """Add tensors that this model saves with its adapter and the model that wrote the source did not.

    A base weight that is trained here and was frozen there gets its initial value. Rows of a table are added under the
    names of the tables that are tied to it.
    """
    unfrozen = live.handle.initial_of("unfrozen")
    frozen = {name: value for name, value in unfrozen.items() if name in adapter.fingerprint}
    shared = _names_of_shared(live)
    stored = {other: value for name, value in adapter.tensors.items() for other in shared.get(name, ())}
    resized = {name: stored.get(name, value) for name, value in live.handle.initial_of("resized").items()}
    tied = {name: value for name, value in stored.items() if names_factor(name)}
    added = {**frozen, **resized, **tied}
    return replace(adapter, tensors={**added, **adapter.tensors}) if added.keys() - adapter.tensors.keys() else adapter


def _names_of_shared(live: LiveState) -> dict[str, list[str]]:
    """Return, for each name of a tensor with several names, all of these names."""
    names: dict[int, list[str]] = {}
    for name, tensor in live.tensors.items():
        if tensor is not None:
            names.setdefault(id(tensor), []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def specs_for(handle: AdaptedModel, adapter: Adapter) -> Specs:
    """Return new options for each layer whose rank or scaling is another in the adapter than in the model.

    Args:
        handle: an injected model.
        adapter: under first names. Where it has no options, the model's hold.

    Raises:
        LoRAError: a sharded layer would get another rank.
    """
    if adapter.config is None:
        return {}
    layers, ranks, specs = handle.layers, adapter.ranks(), {}
    for name in filter(ranks.__contains__, handle.kinds):
        layer, rank, spec = layers[name], ranks[name], layers[name].lora.spec
        scaling = adapter.scalings.get(name, spec.scaling)
        if rank != spec.r and is_sharded(layer.factors()[0]):
            raise LoRAError(
                f"adapter: {name!r} is sharded, and has rank {spec.r}, the adapter {rank}: load it before the model is "
                "sharded."
            )
        if rank != spec.r or not math.isclose(scaling, spec.scaling):
            alpha = scaling * (math.sqrt(rank) if adapter.config.use_rslora else rank)
            specs[layer] = replace(spec, r=rank, scaling=scaling, alpha=alpha)
    return specs


def check_adapter(
    live: LiveState,
    names: Names,
    adapter: Adapter,
    *,
    specs: Specs | None = None,
    values_follow: bool = False,
) -> None:
    """Raise LoRAError for the first layer, scaling, name, shape or value that does not fit the model.

    The base is compared by check_fingerprint.

    Args:
        live: an injected model.
        names: of its modules.
        adapter: under these names.
        specs: the new options of layers, from specs_for.
        values_follow: tensors may be on the meta device, because their values are read later.
    """
    specs = specs or {}
    try:
        _check_layers(live.handle, by_first_names(names, adapter), specs)
        _check_tables(live.handle, adapter)
        _check_tensors(live, names, adapter, specs, values_follow)
    except LoRAError as error:
        config = live.handle.record.config
        differences = (adapter.config or config).differences(config)  # may explain the error
        advice = f" The options differ: {'; '.join(differences)}." if differences else ""
        raise LoRAError(f"{error}{advice}") from None


def _check_layers(handle: AdaptedModel, adapter: Adapter, specs: Specs) -> None:
    layers, kinds = handle.layers, handle.kinds
    _check_names("layer", adapter.layers(), kinds)
    for name in kinds:
        layer = layers[name]
        scaling, spec = adapter.scalings.get(name), specs.get(layer, layer.lora.spec)
        if scaling is not None and not math.isclose(scaling, spec.scaling):
            raise LoRAError(
                f"adapter: layer {name!r} was trained with a scaling (lora_alpha over r) of {scaling:g}, but the model "
                f"was injected with {spec.scaling:g}; use the adapter's own options."
            )
        if isinstance(layer, LoRAConv):
            _refuse_loralib_convolution(name, layer, adapter.tensors)
    for name, kind in adapter.kinds.items():  # a square weight fits a layer that stores its transpose too
        if kinds[name] != kind:
            raise LoRAError(
                f"adapter: layer {name!r} was a {kind} layer where the adapter was trained, here it is {kinds[name]}; "
                "the adapter belongs to another model."
            )


def _check_tables(handle: AdaptedModel, adapter: Adapter) -> None:
    if not adapter.tables and not adapter.peft_rows:
        return
    live = {}
    for name, module, layer in adapted_places(handle.model, modules=handle.places):
        live[name] = layer.replaced_rows()
        if adapter.peft_rows and live[name] and getattr(module, "bias", None) is not None:
            raise LoRAError(f"adapter: {name!r} has trained rows and a bias; {NO_BIAS}.")
    for name, rows in adapter.tables.items():
        if live.get(name, rows) != rows:
            raise LoRAError(
                f"adapter: of {name!r} the rows {listed(list(map(str, rows)), 8)} were trained, and here the options "
                f"name {listed(list(map(str, live[name])), 8)}; use the adapter's own options."
            )


def _refuse_loralib_convolution(name: str, layer: LoRAConv, tensors: Mapping[str, Any]) -> None:
    """Refuse loralib's factors of a convolution: their product (out * k, in * k) has a higher rank in our layout."""
    a, b = tensors.get(f"{name}.{A}"), tensors.get(f"{name}.{B}")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim() == 2:
        shape_a, shape_b = layer.place().factor_shapes()
        raise LoRAError(
            f"adapter: {name!r} is a convolution factorised as in loralib, A (r * k, in * k) {tuple(a.shape)} and B "
            f"(out * k, r * k) {tuple(b.shape)}, whose product A {shape_a} and B {shape_b} cannot express. Merge it "
            "where it was trained (loralib: model.eval()) and load those weights as the base."
        )


def _check_tensors(live: LiveState, names: Names, adapter: Adapter, specs: Specs, values_follow: bool) -> None:
    shapes = {id(factor): torch.Size(shape) for layer, spec in specs.items() for factor, shape in layer.shapes_by(spec)}
    expected = dict.fromkeys(
        name
        for name in live.keys
        if isinstance(live.tensors[name], nn.Parameter) or (adapter.complete and name.startswith(adapter.scope))
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
        lacks_values = isinstance(value, torch.Tensor) and value.is_meta > (tensor.is_meta or values_follow)
        if lacks_values or (isinstance(value, torch.Tensor) and value.layout != tensor.layout):
            raise LoRAError(f"adapter: {name!r} must be a tensor as the model's, found {describe_value(value)}.")
        if id(tensor) in tables and isinstance(value, torch.Tensor):
            _refuse_other_rows(name, value, tensor)
        shape = shapes.get(id(tensor), tensor.shape)
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            shown = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise LoRAError(f"adapter: {name!r} must have shape {tuple(shape)}, but has {shown}.")
        if value.is_floating_point() != tensor.is_floating_point():
            raise LoRAError(f"adapter: {name!r} must be {tensor.dtype}, but is {value.dtype}.")
        if value.is_floating_point() and isinstance(tensor, nn.Parameter) and not names_factor(name):
            check_finite(name, value)  # factors have been checked where they were read


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
                    f"{untie_advice(other)}."
                )


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)) or one.is_meta:
        return True  # a distributed checkpoint is checked before its values are read
    return torch.equal(one, other)


def _check_names(what: str, names: Iterable[str], expected: Iterable[str]) -> None:
    names, expected = list(names), list(expected)
    missing, unexpected = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or unexpected:
        if missing:
            first, hint = f"{missing[0]!r} is missing", near_misses(missing[0], names)
        else:
            first, hint = f"{unexpected[0]!r} has no place in the model", near_misses(unexpected[0], expected)
        raise LoRAError(
            f"adapter: {what} {first} (in all {len(missing)} missing, {len(unexpected)} unexpected){hint}. The adapter "
            "was saved from a model with other layers or options."
        )


def copy_values(live: LiveState, adapter: Adapter, specs: Specs | None = None, *, merge_after: bool = False) -> None:
    """Write an adapter's values into the live tensors, all of them or none. In place.

    Copying can fail: merging may find that W' is beyond its dtype, and a module may refuse its extra state.

    Args:
        live: an injected model, unmerged; after an error it is unmerged too.
        adapter: checked by check_adapter.
        specs: from specs_for. A factor of another rank gets new memory and loses its gradient; the parameter object
            stays.
        merge_after: whether the model is merged then. If that fails, the old values are put back.
    """
    handle = live.handle
    record, kept, config_before = handle.record, handle.kept(), handle.record.config
    specs_before = {layer: layer.lora.spec for layer in specs or {}}
    factors = [factor for layer, spec in specs_before.items() for factor, _ in layer.shapes_by(spec)]
    memory = [(factor, factor.data, factor.grad) for factor in factors]
    values_before = _values_now(live, adapter.tensors)
    try:
        record_trained(live, adapter)
        _take_specs_(handle, adapter, specs or {})
        _write_(live, adapter.tensors)
        handle.record_trainable(expected=True)
        if merge_after:
            merge_listed(handle)
    except BaseException:
        handle.put_back(kept)
        record.config = config_before
        for layer, spec in specs_before.items():
            layer.lora.spec = spec
        for factor, data, gradient in memory:
            factor.data = data
            factor.grad = gradient
        _write_(live, values_before)
        raise


def record_trained(live: LiveState, adapter: Adapter) -> None:
    """Record base parameters that the adapter holds as trained, with their present values as initial ones."""
    whole = [name for name in adapter.tensors if not names_factor(name) and name in live.tensors]
    if any(isinstance(live.tensors[name], nn.Parameter) for name in whole):
        live.handle.record_unfrozen(whole)


def _values_now(live: LiveState, names: Iterable[str]) -> dict[str, Any]:
    tensors = {name: live.tensors[name] for name in names}
    states = {name: cast(Any, live.owners[name]).get_extra_state() for name, value in tensors.items() if value is None}
    return states | copies_of({name: value for name, value in tensors.items() if value is not None})


def _take_specs_(handle: AdaptedModel, adapter: Adapter, specs: Specs) -> None:
    """Give layers and options the ranks and scalings of an adapter, before its values are copied. In place."""
    if not specs or adapter.config is None:
        return
    record = handle.record
    resized = [layer.lora.name for layer, spec in specs.items() if spec.r != layer.lora.spec.r]
    in_training = any(factor.grad is not None for layer in specs for factor in layer.factors())
    for layer, spec in specs.items():
        layer.take_spec_(spec)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    config = replace(record.config, **{name: getattr(adapter.config, name) for name in names})
    layers = [layer.lora for layer in handle.layers.values() if layer.kind()]
    ranks, scalings = ({s.name: getattr(s.spec, field) for s in layers} for field in ("r", "scaling"))
    record.config = config if options_hold(config, ranks, scalings) else with_exact_ranks(config, ranks, scalings)
    log.info("lightning_lora: load_adapter: %d layers take the adapter's rank and scaling", len(specs))
    if resized and in_training:
        warnings.warn(
            f"lightning_lora: load_adapter: {len(resized)} layers that have gradients get another rank, first "
            f"{resized[0]!r}. An optimizer goes on with these parameters, but what it has gathered of them does not "
            "fit: clear that (optimizer.state.clear()), or build it anew.",
            stacklevel=5,
        )


def _write_(live: LiveState, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if live.tensors[name] is None:
            owner = cast(Any, live.owners[name])
            owner.set_extra_state(copy.deepcopy(value))  # an adapter in memory does not change with the model
    copy_all_([(tensor, value) for name, value in values.items() if (tensor := live.tensors[name]) is not None])
