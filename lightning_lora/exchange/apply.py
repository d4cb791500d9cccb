"""Put an adapter onto a model: inject, compare base, layers, names and shapes, then copy all values or none.

What takes a failed load back, the last first:

    what was done                   registered in           taken back by
    merged after the copy           copy_values             unmerge_if_merged
    foreign entries                 copy_values             load_foreign_
    values                          copy_values             _write_ of _values_now, into the new memory
    injection.chosen and config     _take_specs_            setattr
    ranks, memory, gradients        _take_specs_            setattr
    facts                           copy_values             take_back_facts_
    other layers                    _replace_layers         _put_back_; setattr for memory, gradients, requires_grad
    facts of what was unfrozen      apply_adapter           take_back_facts_
    unmerged before                 apply_adapter           _merge_again
    a new injection                 apply_adapter           _take_out_begun
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..adapter.adapter import Adapter, saved_modules
from ..adapter.fingerprint import REMEDY
from ..config import LoRAConfig
from ..distributed.deepspeed_optimizer import update_copies_
from ..distributed.sharding import copies_of, copy_all_, refuse_fully_sharded
from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, Listing, find_adapted
from ..model.foreign_state import foreign_entries, load_foreign_
from ..model.initial_values import Recorded, facts_before, take_back_facts_
from ..model.inject import StoredParameters, inject_layers, replace_layers, stored_parameters, take_out_adapter
from ..model.injection import Injection
from ..model.live_state import LiveState, open_state
from ..model.merging import holds_merged, merge_listed, unmerge_if_merged, unmerge_listed
from ..model.quantize import quantize_named_
from ..model.transaction import transaction
from ..nn.adapted_weights import LayerSpec
from ..nn.claims import claimed
from ..nn.quantized import NF4, quantized_parameters
from ..notices import tell
from .align import add_frozen_weights, align_names, as_in_model, record_trained, split_off_base, split_off_foreign
from .first_names import Names, by_first_names
from .fit_checks import Specs, check_adapter, chosen_by, specs_for
from .take import adapter_here, check_fingerprint
from .trained_with import check_attached


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
    with transaction() as on_error:
        on_error.callback(take_back_facts_, handle, facts_before(handle))
        record_trained(live, adapter)
        _take_specs_(handle, adapter, specs or {}, on_error)
        # After the specs: a factor of another rank has new memory here, and its old one is not written to.
        on_error.callback(_write_, live, _values_now(live, adapter.tensors))
        _write_(live, adapter.tensors)
        if adapter.foreign.values:
            on_error.callback(load_foreign_, live, copy.deepcopy(foreign_entries(handle)))
            load_foreign_(live, adapter.foreign)
        handle.record_trainable(expected=True)
        if merge_after:
            on_error.callback(unmerge_if_merged, handle)
            merge_listed(handle, warns=False)


def _values_now(live: LiveState, names: Iterable[str]) -> dict[str, Any]:
    tensors = {name: live.tensors[name] for name in names}
    states = {name: cast(Any, live.owners[name]).get_extra_state() for name, value in tensors.items() if value is None}
    return states | copies_of({name: value for name, value in tensors.items() if value is not None})


def _take_specs_(handle: AdaptedModel, adapter: Adapter, specs: Specs, on_error: ExitStack) -> None:
    """Give the layers the adapter's ranks and scalings, and the injection its options. In place."""
    if not specs or adapter.config is None:
        return
    injection = handle.injection
    resized = [layer.lora.name for layer, spec in specs.items() if spec.r != layer.lora.spec.r]
    in_training = any(factor.grad is not None for layer in specs for factor in layer.trained_tensors())
    for layer, spec in specs.items():
        on_error.callback(setattr, layer.lora, "spec", layer.lora.spec)
        for factor in layer.stored().values():
            on_error.callback(setattr, factor, "grad", factor.grad)  # after the data, whose shape it must have
            on_error.callback(setattr, factor, "data", factor.data)
        layer.take_spec_(spec)
    on_error.callback(setattr, injection, "config", injection.config)
    injection.config = replace(adapter.config, lora_dropout=injection.config.lora_dropout)
    on_error.callback(setattr, injection, "chosen", injection.chosen)
    injection.chosen = chosen_by(adapter)
    if resized and in_training:
        warnings.warn(
            f"lightning_lora: load_adapter: {len(resized)} layers that have gradients get another rank, first "
            f"{resized[0]!r}. An optimizer goes on with these parameters, but what it has gathered of them does not "
            "fit: clear that (optimizer.state.clear()), or build it anew.",
            stacklevel=6,
        )


def _write_(live: LiveState, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if live.tensors[name] is None:
            owner = cast(Any, live.owners[name])
            owner.set_extra_state(copy.deepcopy(value))  # an adapter in memory does not change with the model
    written = [(tensor, value) for name, value in values.items() if (tensor := live.tensors[name]) is not None]
    copy_all_(written)
    update_copies_(written)


def apply_adapter(
    listing: Listing, adapter: Adapter, *, strict_base: bool = True, remedy: str = REMEDY, swap: bool = False
) -> list[str]:
    """Put an adapter onto a model: inject it if needed, check everything, then copy the values. In place.

    Args:
        listing: of the model without wrappers; its handle where it is injected.
        adapter: under any prefix.
        strict_base: whether another base than the adapter's is an error or a warning.
        remedy: the advice at the end of the error about another base.
        swap: whether an injected model may get other layers, ranks and scalings.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    names = Names(listing.places)
    adapter = by_first_names(names, align_names(listing, names, adapter))
    check_attached(listing, adapter)
    if not isinstance(listing, AdaptedModel):
        injection = new_injection(adapter)
        with transaction() as on_error:
            on_error.callback(_take_out_begun, listing.model, injection)
            handle = inject_layers(listing, injection)
            with claimed("load_adapter", injection.claims):
                return _check_and_copy_(open_state(handle), names, adapter, strict_base=strict_base, remedy=remedy)
    handle = listing
    _tell_of_options(handle, adapter)
    with claimed("load_adapter", handle.injection.claims), transaction() as on_error:
        was_merged = holds_merged(handle)
        if was_merged:
            on_error.callback(_merge_again, listing.model)
            unmerge_listed(handle)  # at once: reading W out of W' takes as long
        before = facts_before(handle)
        on_error.callback(take_back_facts_, handle, before)
        if swap and adapter.config is not None:
            # open_state warns of what was unfrozen; a head that this adapter trains is expected.
            trains = {name for name, tensor, _ in handle.state() if getattr(tensor, "requires_grad", False)}
            handle.record_unfrozen(chosen_by(adapter).whole & trains)
        live = open_state(handle)
        specs: Specs = {}
        if swap and not has_place_for(live, adapter):
            live = _replace_layers(handle, adapter, before, on_error)
        elif swap:
            specs = specs_for(handle, adapter)
        return _check_and_copy_(live, names, adapter, specs, was_merged, strict_base=strict_base, remedy=remedy)


def _take_out_begun(model: nn.Module, injection: Injection) -> None:
    """Take out what an injection has put into a model, as far as it came. In place."""
    if injection.holder() is not None:
        take_out_adapter(cast(AdaptedModel, find_adapted(model)))


def _merge_again(model: nn.Module) -> None:
    merge_listed(cast(AdaptedModel, find_adapted(model)))  # other layers may be in it than when it was unmerged


def _check_and_copy_(
    live: LiveState,
    names: Names,
    adapter: Adapter,
    specs: Specs | None = None,
    merge_after: bool = False,
    *,
    strict_base: bool,
    remedy: str = REMEDY,
) -> list[str]:
    """Write an adapter into a model that has its layers, after all checks. In place. All or nothing."""
    handle = live.handle
    adapter = as_in_model(adapter, handle.kinds)
    adapter = add_frozen_weights(live, split_off_foreign(live, split_off_base(live, adapter)))
    check_adapter(live, names, adapter, specs=specs)
    check_fingerprint(live, adapter.fingerprint, strict=strict_base, remedy=remedy)
    copy_values(live, adapter, specs, merge_after=merge_after)
    handle.injection.origin = dict(adapter.origin)
    _tell_of_narrower(live, adapter)
    return list(handle.layers)


def _replace_layers(handle: AdaptedModel, adapter: Adapter, before: Recorded, on_error: ExitStack) -> LiveState:
    """Take out the adapter of a model, and put in the layers of another, whose values are written next. In place.

    Args:
        handle: of the model, unmerged.
        adapter: the other one.
        before: what take_back_facts_ is to bring back.
        on_error: gives the model its own adapter back.

    Raises:
        LoRAError: a fit is under way, or the model is sharded.
    """
    if handle.injection.fits:
        raise LoRAError(
            "load_adapter: inside a fit the adapter's layers and heads must be the model's, because the optimizer "
            "holds these parameters. Load it before the fit."
        )
    refuse_fully_sharded(handle.root, [module for _, module in handle.root_modules], "load_adapter")
    earlier = stored_parameters(handle)
    for parameter in (*(stored for _, _, stored in earlier), *(each.parameter for each in handle.base())):
        on_error.callback(setattr, parameter, "requires_grad", parameter.requires_grad)
    for _, _, parameter in earlier:
        on_error.callback(setattr, parameter, "grad", parameter.grad)  # after the data, whose shape it must have
        on_error.callback(setattr, parameter, "data", parameter.data)
    specs = {name: layer.lora.spec for name, layer in handle.layers.items()}
    on_error.callback(_put_back_, handle, earlier, adapter_here(handle), specs, before)
    return LiveState(replace_layers(handle, earlier, cast(LoRAConfig, adapter.config), chosen_by(adapter)))


def _put_back_(
    handle: AdaptedModel,
    earlier: StoredParameters,
    adapter: Adapter,
    specs: Mapping[str, LayerSpec],
    before: Recorded,
) -> None:
    """Give a model, in which the layers of another adapter are or were begun, its own ones back. In place.

    chosen_by tells what an adapter's options train. It does not tell what was unfrozen by hand, or that the options
    select the layers: so what the earlier injection knew is written into the new one.

    Args:
        handle: of the earlier injection.
        earlier: the parameters that the model stored before the replacement.
        adapter: the earlier one.
        specs: of its layers.
        before: what take_back_facts_ is to bring back.
    """
    here = replace_layers(handle, earlier, cast(LoRAConfig, adapter.config), chosen_by(adapter))
    live = LiveState(here)
    _write_(live, adapter.tensors)
    if adapter.foreign.values:
        load_foreign_(live, adapter.foreign)
    for name, layer in here.layers.items():
        layer.lora.spec = specs[name]
    for field in ("config", "chosen", "layers", "origin"):
        setattr(here.injection, field, getattr(handle.injection, field))
    take_back_facts_(here, before)


def has_place_for(live: LiveState, adapter: Adapter) -> bool:
    """Return whether a model has an adapter's layers, variant, rows and modules that are fully trained.

    An adapter without options is loaded with the model's.
    """
    if adapter.config is None:
        return True
    handle = live.handle
    layers = {name: layer for name, layer in handle.layers.items() if layer.kind()}
    variants = {(id(layer.lora.spec.variant), *sorted(layer.lora.spec.options.items())) for layer in layers.values()}
    rows = {name: layer.replaced_rows() for name, layer in handle.layers_by_every_name.items() if not layer.kind()}
    parameters = {name: id(tensor) for name, tensor in live.tensors.items() if isinstance(tensor, nn.Parameter)}
    asked = handle.trained("asked").intersection(parameters.values())
    whole = {parameters[name] for name in chosen_by(adapter).whole & parameters.keys()}
    return (
        adapter.layers.keys() == layers.keys()
        and variants <= {(id(adapter.variant), *sorted(adapter.config.all_variant_options().items()))}
        and adapter.tables.items() <= rows.items()
        and adapter.tables.keys() | adapter.tied.keys() >= rows.keys()
        and asked == whole
    )


def _tell_of_narrower(live: LiveState, adapter: Adapter) -> None:
    """Say that what was fully trained, such as a head, has fewer digits in this model than in the adapter."""
    for name, value in adapter.whole_tensors().items():
        here = live.tensors[name]
        if not isinstance(here, nn.Parameter) or not here.is_floating_point():
            continue
        if torch.finfo(here.dtype).eps > torch.finfo(value.dtype).eps:
            was, dtype = (str(tensor.dtype).removeprefix("torch.") for tensor in (value, here))
            tell(
                f"lightning_lora: load_adapter: {name!r} was trained in {was} and is rounded to {dtype}, as this model "
                f"has it. To keep its values, cast its module to {was} before loading."
            )
            return


def quantize_as_trained_(listing: Listing, adapter: Adapter) -> None:
    """Quantize the layers of a new model that quantize_base had quantized where an adapter was trained. In place.

    Args:
        listing: of the model. Layers that are quantized or adapted already stay as they are.
        adapter: under any prefix.

    Raises:
        LoRAError: torchao is missing, or a weight cannot be quantized.
    """
    if any(entry.quantized == NF4 for entry in adapter.fingerprint.values()):
        names = Names(listing.places)
        adapter = by_first_names(names, align_names(listing, names, adapter))
        quantized = {name for name, entry in adapter.fingerprint.items() if entry.quantized == NF4}
        layers = [(name, module) for name, module in listing.modules if f"{name}.weight" in quantized]
        quantize_named_(listing, [name for name, module in layers if not quantized_parameters(module)])


def _tell_of_options(handle: AdaptedModel, adapter: Adapter) -> None:
    """Log the model's options, which hold if the source has none."""
    if adapter.config is None and handle.layers:
        options = handle.injection.config
        scale = f"lora_alpha={options.lora_alpha:g}, use_rslora={options.use_rslora}"
        tell(f"lightning_lora: the source stores no options; those of the injected model hold: {scale}")


def new_injection(adapter: Adapter) -> Injection:
    """Return a new injection for a model with the layers, rows and whole modules that an adapter has.

    Args:
        adapter: under the model's first names.

    Raises:
        LoRAError: the adapter's source stores no options.
    """
    if adapter.config is None:
        stored = sorted({layer.r for layer in adapter.layers.values()})
        saved = _leaves(saved_modules(adapter))
        raise LoRAError(
            "adapter: the source stores tensors and no options, as loralib's files do. Its factors have rank "
            f"{' and '.join(map(str, stored))}; lora_alpha is nowhere in it and must come from whoever trained it. "
            f"Call inject(model, LoRAConfig(r={stored[0]}, lora_alpha=..., target_modules=[{_leaves(adapter.layers)}]"
            f"{f', modules_to_save=[{saved}]' if saved else ''})) first, then load_adapter again."
        )
    return Injection(adapter.config, chosen=chosen_by(adapter))


def _leaves(modules: Iterable[str]) -> str:
    """Return the last segments of module names, quoted, as the text of a list."""
    return ", ".join(map(repr, dict.fromkeys(module.rpartition(".")[2] for module in modules)))
