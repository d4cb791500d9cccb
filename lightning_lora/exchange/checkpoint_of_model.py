"""Lightning's checkpoints of an injected model: converted when they are saved, completed when they are loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, MutableMapping, Set
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import entries_match, fingerprint_entries
from ..distributed.deepspeed_optimizer import update_copies_
from ..distributed.flat import owns_flat, unsharded_shape
from ..distributed.sharding import copy_all_, gather_all, holds_shards, whole_on_cpu
from ..errors import LoRAError, NonFiniteError
from ..formats.hyper_parameters import HYPER_PARAMETERS
from ..formats.lightning_checkpoint import (
    COPIES,
    CURRENT,
    Kind,
    adapter_in_checkpoint,
    by_canonical_names,
    checkpoint_metadata,
    copies_in,
)
from ..model.adapted_model import AdaptedModel, find_adapted, open_model
from ..model.attached import attached, detach, set_strength, strengths_outside
from ..model.dequantize import dequantize_dtype, quantized_weights
from ..model.foreign_state import (
    foreign_entries,
    foreign_names,
    load_foreign_,
    unchanged_state,
    with_foreign,
    without_base,
)
from ..model.initial_values import record_loaded
from ..model.inject import take_out_adapter
from ..model.live_state import LiveState, open_state, original_value, original_values
from ..model.load_state_dict import mark_merged
from ..model.merging import unmerge_if_merged
from ..model.recorded_layers import refuse_replaced_layers
from ..model.state_dict import merge_state_dict
from ..names import META, canonical, names_factor, parent_names
from ..nn.adapted_module import MERGED, adapted_layers, refuse_merged_weights
from ..nn.claims import claimed
from ..nn.foreign_entries import ForeignEntries, foreign_of, metadata_of, with_metadata
from .align import add_frozen_weights, align_names, record_trained
from .first_names import Names
from .fit_checks import check_adapter
from .take import adapter_in_state, check_fingerprint
from .trained_with import check_attached_of_run

REMEDY_IN_TRAINER = (
    "Build the module with the weights that it had in training. To use the adapter on this base all the same, in "
    "Python call load_adapter(model, path, strict_base=False) and leave ckpt_path out."
)
OPTIONS_IN_TRAINER = (
    "To take the checkpoint's, where it is a local file, leave them out of LoRACallback. If the model already has an "
    "adapter, call unload(model) first."
)


def convert_checkpoint(
    module: nn.Module, checkpoint: MutableMapping[str, Any], kind: Kind, dequantize: Any = None
) -> None:
    """Turn a checkpoint with a complete state_dict into one of the given kind. In place. Collective.

    | save | state_dict | checkpoint["lora"], beside options and fingerprint |
    |---|---|---|
    | "adapter" | factors and whole tensors | |
    | "full" | all of the model | `initial`: values from before training |
    | "merged" | W' under the plain model's names, and whole tensors | `adapter`: factors and whole tensors |

    For a divided model, gathered_state has chosen, merged and gathered the tensors of the state_dict.

    Args:
        module: an injected LightningModule.
        checkpoint: of the whole module.
        kind: of the checkpoint that it becomes.
        dequantize: the dtype of plain weights in place of quantized ones, where merged weights are written.

    Raises:
        LoRAError: the kind cannot express the adapter, or another thread changes or saves the model.
    """
    handle = open_model(module, "checkpoint")
    with claimed("save_checkpoint", handle.injection.claims):
        refuse_replaced_layers(handle, "checkpoint")
        live, saved = open_state(handle), checkpoint["state_dict"]
        state = by_canonical_names(saved)
        foreign = foreign_of(saved, foreign_names(handle, saved, live.tensors.keys()))
        if kind == "full":
            _convert_to_full(live, checkpoint, state, foreign)
            return
        # Of other entries only what was trained is kept: the base comes back with the model.
        adapter = adapter_in_state(live, state, without_base(handle, foreign))
        if CURRENT in checkpoint:
            own = {*live.changing, *adapter.foreign.values}
            current = checkpoint[CURRENT].items()
            checkpoint[CURRENT] = {name: value for name, value in current if canonical(name) in own}
        if not is_divided(handle):  # otherwise gathered_state has left the base out, or merged it
            _warn_of_moved(live, state, adapter, kind)
        checkpoint[META] = checkpoint_metadata(kind, adapter)
        if kind == "adapter":
            checkpoint["state_dict"] = {**adapter.tensors, **adapter.foreign.values}
        else:
            _convert_to_merged(live, checkpoint, state, adapter, dequantize)


def _convert_to_full(
    live: LiveState, checkpoint: MutableMapping[str, Any], state: dict[str, Any], foreign: ForeignEntries
) -> None:
    adapter = adapter_in_state(live, state, foreign)
    state |= adapter.tensors  # also those that the class's own state_dict() leaves out
    checkpoint[META] = checkpoint_metadata("full", replace(adapter, complete=state.keys() >= live.tensors.keys()))
    if copies := [canonical(name) for name in live.handle.copies]:
        checkpoint[META][COPIES] = copies
    # A fit that goes on from here can still be taken out with unload, and evaluated with disable_adapter.
    checkpoint[META]["initial"] = gather_all(live.handle.initial())
    saved = checkpoint["state_dict"]
    checkpoint["state_dict"] = with_metadata(_by_names_of(saved, state), metadata_of(saved))


def _convert_to_merged(
    live: LiveState, checkpoint: MutableMapping[str, Any], state: dict[str, Any], adapter: Adapter, dequantize: Any
) -> None:
    handle, divided = live.handle, is_divided(live.handle)
    checkpoint[META]["adapter"] = adapter.tensors  # so that a fit resumes from it: W and A, B are not found in W'
    # Whole tensors may be an average that a callback put into the state_dict. Factors stay as the state has them: a
    # layer whose factors the class left out is not in its merged weights.
    state |= {name: value for name, value in adapter.tensors.items() if not names_factor(name)}
    if divided:
        state = {name: value for name, value in state.items() if not names_factor(name)}
    else:
        state = _merge_state(handle, state, dequantize)
    _write_plain_networks(checkpoint, divided=divided)
    saved = checkpoint["state_dict"]
    checkpoint["state_dict"] = mark_merged(_by_names_of(saved, state), metadata_of(saved))


def _by_names_of(saved: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state by the names in a saved one, which torch.compile and checkpoint_wrapper add prefixes to."""
    names = {canonical(name): name for name in saved}
    return {names.get(name, name): value for name, value in state.items()}


def _write_plain_networks(checkpoint: Mapping[str, Any], *, divided: bool) -> None:
    """Put copies without an adapter in the place of adapted networks among the hyper-parameters. In place.

    save_hyperparameters() keeps the network that a class is built around, and Lightning pickles it. Around the adapted
    one, a class would be built with an adapter, to which W' is added once more. A copy has the values from before
    training: W' comes with the state dict, and load_from_checkpoint finds the base that the adapter was trained on.

    Args:
        checkpoint: its mapping of hyper-parameters is its own, and not the module's.
        divided: whether ranks hold parts of the weights, which are not copied.
    """
    saved = checkpoint.get(HYPER_PARAMETERS)
    if not isinstance(saved, dict):
        return
    networks = {name: value for name, value in saved.items() if isinstance(value, nn.Module) and adapted_layers(value)}
    for name, network in networks.items():
        reason = "its weights are divided over ranks" if divided else ""
        try:
            if not divided:
                saved[name] = _without_adapters(copy.deepcopy(network))
        except Exception as error:  # of a user's class, or no memory: it must not break off a fit
            reason = repr(error)
        if reason:
            warnings.warn(
                f"lightning_lora: checkpoint: the hyper-parameter {name!r} is the adapted network, and cannot be "
                f"copied without the adapter ({reason}). So the merged checkpoint needs lightning_lora to be read. "
                f"Leave it out with save_hyperparameters(ignore=[{name!r}]), or save the model after a fit with "
                "merge_after_fit=True.",
                stacklevel=2,
            )


def _without_adapters(network: nn.Module) -> nn.Module:
    for name in attached(network):
        detach(network, name)
    if handle := find_adapted(network, part=True):
        unmerge_if_merged(handle)
        take_out_adapter(handle)
    return network


def _warn_of_moved(live: LiveState, state: Mapping[str, Any], adapter: Adapter, kind: Kind) -> None:
    """Warn of frozen weights that something has changed since fit start: a checkpoint without them loses the change."""
    at_fit_start = {name: entry for name, entry in adapter.fingerprint.items() if name in state and entry.values}
    now = fingerprint_entries((name, state[name]) for name in at_fit_start)
    moved = [name for name, entry in at_fit_start.items() if not entries_match(entry, now[name])]
    if moved:
        weights = {id(live.tensors.get(name, name)) for name in moved}  # a tied weight has several names
        warnings.warn(
            f"lightning_lora: checkpoint: {moved[0]!r} is frozen and has changed since the first fit began "
            f"({len(weights)} such weights), as those of a momentum encoder do. Whoever resumes or loads a checkpoint "
            f'saved with save={kind!r} gets it as it was then; save="full" keeps it. A new base comes '
            "by load_state_dict, or by inject on a new model.",
            stacklevel=2,
        )


def _merge_state(handle: AdaptedModel, state: Mapping[str, Any], dequantize: Any) -> dict[str, Any]:
    try:
        dtype = dequantize_dtype(dequantize, "checkpoint")
        with strengths_outside(handle):  # the file's adapter has these strengths too, and no `scaled` lasts in a file
            return merge_state_dict(handle, state, dtype)
    except NonFiniteError as error:
        raise NonFiniteError(
            f'{error} Merged weights cannot hold that; with save="adapter" or "full" a diverged run is saved as it is.'
        ) from error


def prepare_for_load(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Complete the state dicts of a checkpoint of any kind, so that Lightning's strict load takes them. In place.

    Args:
        module: an injected module.
        checkpoint: its content.

    Raises:
        LoRAError: the checkpoint does not fit the injected module. Nothing is loaded.
    """
    if META not in checkpoint:
        return  # a base checkpoint or a full state dict: torch's strict load checks it
    adapter, kind = adapter_in_checkpoint(checkpoint)
    live = open_state(open_model(module, "checkpoint"))
    module_names = Names(live.handle.places)
    if kind == "full":
        _prepare_full(live, module_names, checkpoint, adapter)
        return
    adapter = align_names(live.handle, module_names, adapter)  # an imported adapter has the network's names
    strengths = check_attached_of_run(live.handle, adapter)
    complete = add_frozen_weights(live, adapter)
    check_adapter(live, module_names, complete, remedy=OPTIONS_IN_TRAINER)
    check_fingerprint(live, complete.fingerprint, remedy=REMEDY_IN_TRAINER)
    record_trained(live, adapter)
    live.handle.injection.origin = dict(adapter.origin)
    here = {} if is_divided(live.handle) else unchanged_state(live.handle)  # write_whole_state_ needs no more
    whole = with_metadata({**here, **complete.tensors}, metadata_of(here))
    if CURRENT in checkpoint:
        current = with_metadata(whole | by_canonical_names(checkpoint[CURRENT]), metadata_of(here))
        checkpoint[CURRENT] = with_foreign(live, current, ForeignEntries())
    checkpoint["state_dict"] = with_foreign(live, whole, adapter.foreign)
    _take_strengths_(live.handle, strengths)


def _prepare_full(live: LiveState, names: Names, checkpoint: MutableMapping[str, Any], adapter: Adapter) -> None:
    """Check and complete a full checkpoint, and record its initial values. It brings a base: no fingerprint is kept."""
    metadata = metadata_of(checkpoint["state_dict"])
    state = by_canonical_names(checkpoint["state_dict"])
    # A frozen copy of an adapted network gets its own values again. A model that has not made it yet leaves them out.
    copies, here = copies_in(checkpoint[META]), live.handle.copies
    state = {
        name: value
        for name, value in state.items()
        if not name.startswith(copies) or name.startswith(here) or name in live.tensors
    }
    in_pieces = {outer for name in adapter.foreign.values for outer in parent_names(name)}  # weights of quanto's layers
    strengths = check_attached_of_run(live.handle, adapter)
    missing = [name for name in live.tensors if name not in state and name not in in_pieces]
    left_out = {name: entry for name, entry in adapter.fingerprint.items() if name in missing}
    complete = replace(add_frozen_weights(live, adapter), fingerprint=left_out)
    check_adapter(live, names, complete, remedy=OPTIONS_IN_TRAINER)
    check_fingerprint(live, complete.fingerprint)
    if missing and adapter.complete:
        raise LoRAError(
            f"checkpoint: the full checkpoint lacks {len(missing)} of the model's tensors, first {missing[0]!r}; "
            "it was cut or saved from another model."
        )
    initial = _read_initial(live, checkpoint[META].get("initial"))
    record_trained(live, adapter)
    handle, injection = live.handle, live.handle.injection
    trained = {id(live.tensors[name]) for name in adapter.tensors if name in live.tensors}
    recorded = handle.initial_of().items()
    frozen = {name: state.get(name, value) for name, value in recorded if id(live.tensors[name]) not in trained}
    handle.set_initial(frozen | initial)  # where it was trained, the first value is in the file, or nothing knows it
    handle.set_fingerprint({})
    injection.origin = dict(adapter.origin)
    for name in missing:  # left out by the class that saved
        tensor, owner = live.tensors[name], live.owners[name]
        state[name] = cast(Any, owner).get_extra_state() if tensor is None else original_value(name, tensor, owner)
    checkpoint["state_dict"] = with_foreign(live, with_metadata(state, metadata), adapter.foreign)
    _take_strengths_(live.handle, strengths)


def _take_strengths_(handle: AdaptedModel, strengths: Mapping[str, float]) -> None:
    """Give attached adapters the weights that they have in a checkpoint. In place."""
    if strengths:
        set_strength(handle.model, strengths)


def is_divided(handle: AdaptedModel) -> bool:
    """Return whether ranks hold parts of a model's weights."""
    return any(holds_shards(module) or owns_flat(module) for _, module in handle.modules)


def gathered_state(handle: AdaptedModel, kind: Kind | None, dequantize: Any, *, keep: bool) -> dict[str, Any]:
    """Return what a checkpoint of this kind holds, as whole tensors on the CPU, one by one. Collective.

    Of a model that is not divided it is the whole state dict, which convert_checkpoint converts.

    Args:
        handle: of the model.
        kind: of the checkpoint; None for the model's own state dict.
        dequantize: as in convert_checkpoint.
        keep: whether this rank writes files. Elsewhere tensors of the base are dropped, and come on the meta device.
    """
    if not is_divided(handle):
        return handle.model.state_dict()
    live = open_state(handle)
    foreign = foreign_entries(handle)
    state = live.values() if kind == "adapter" else original_values(live.entries)
    state = with_metadata({**state, **foreign.values}, foreign.versions)
    if kind == "merged":  # the adapter stays beside: a callback may put an average in the place of all of it
        state |= _merge_state(handle, state, dequantize)
    changing = set(live.changing)
    gathered = dict(state)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):  # every rank gathers each, also those that it does not keep
            gathered[name] = whole_on_cpu(value).to("cpu" if keep or name in changing else "meta")
    return with_metadata(gathered, foreign.versions)


def write_whole_state_(handle: AdaptedModel, checkpoint: Mapping[str, Any], *, strict: bool) -> None:
    """Write the state dict of a checkpoint into a model: this rank's parts where it is divided. In place.

    DeepSpeed's copies of what is written follow.

    Args:
        handle: of the model.
        checkpoint: prepare_for_load has completed it.
        strict: as in load_state_dict.

    Raises:
        LoRAError: the state dict does not fit. Nothing is loaded.
    """
    state, live = checkpoint["state_dict"], LiveState(handle)
    named = by_canonical_names(state)
    pairs = [(tensor, named[name]) for name, tensor in live.tensors.items() if tensor is not None and name in named]
    if is_divided(handle):
        is_state_dict = META not in checkpoint
        if any(entry.get(MERGED) for entry in metadata_of(state).values()):  # no layer looks at it here
            refuse_merged_weights(type(handle.model).__name__, handle.all_layers.values())
        if is_state_dict and strict:
            check_complete(handle, named.keys() - foreign_entries(handle).values.keys(), "checkpoint")
        _check_values(live, named)
        if is_state_dict and not any(map(names_factor, named)):
            _record_base(live, named)
        for name in [each for each in named if live.tensors.get(each, named) is None]:
            cast(Any, live.owners[name]).set_extra_state(named[name])
        copy_all_(pairs)
        load_foreign_(live, foreign_of(state, foreign_names(handle, state, live.tensors.keys())))
    else:
        handle.model.load_state_dict(state, strict=strict)
    update_copies_(pairs)


def _record_base(live: LiveState, state: Mapping[str, Any]) -> None:
    """Record a base that is about to be loaded without an adapter as the values from before training.

    Raises:
        LoRAError: adapters would have to start again from it.
    """
    for name, layer in live.handle.layers.items():
        if layer.lora.spec.variant.follows_weight:
            raise LoRAError(
                f"checkpoint: it holds a base without an adapter, and the adapter of {name!r} started from the weight "
                "that it replaces. Load the base into the module before the Trainer divides it over ranks."
            )
    record_loaded(live.handle, state)


def check_complete(handle: AdaptedModel, names: Set[str], source: object) -> None:
    """Raise LoRAError unless a state dict without metadata holds the complete base, the complete adapter, or both."""
    base, adapter = set(handle.base_keys()), set(open_state(handle).changing)
    if names in (base | adapter, base, adapter):
        return
    expected = adapter if names & (adapter - base) else base
    expected = expected | base if names & (base - adapter) else expected
    unknown, missing = sorted(names - base - adapter), sorted(expected - names)
    first = f"{unknown[0]!r} has no place in the model" if unknown else f"{missing[0]!r} is missing"
    raise LoRAError(
        f"{source}: a state dict must hold the complete base, the complete adapter or both, but {first} "
        f"({len(missing)} missing, {len(unknown)} unexpected)."
    )


def _check_values(live: LiveState, state: Mapping[str, Any]) -> None:
    """Raise LoRAError where whole tensors cannot be written into the divided tensors of a model."""
    for name in quantized_weights(live.handle.places):
        if name in state:
            raise LoRAError(
                f"checkpoint: holds the base, but {name!r} is quantized and sharded here. Load the base before "
                "quantize_base and fully_shard, and after them only an adapter or a merged checkpoint."
            )
    for name, tensor in live.tensors.items():
        value = state.get(name)
        if tensor is not None and value is not None and value.shape != unsharded_shape(tensor):
            shape = tuple(unsharded_shape(tensor))
            raise LoRAError(f"checkpoint: {name!r} must have shape {shape}, but has {tuple(value.shape)}.")


def _read_initial(live: LiveState, initial: Any) -> dict[str, torch.Tensor]:
    """Return the values from before training, by the model's names. LoRAError: they do not fit the model."""
    shapes = {name: unsharded_shape(tensor) for name, tensor in live.tensors.items() if tensor is not None}
    if isinstance(initial, Mapping) and all(
        isinstance(value, torch.Tensor) and shapes.get(name) == value.shape for name, value in initial.items()
    ):
        return dict(initial)
    shown = f"names {sorted(map(str, initial))[:3]}" if isinstance(initial, Mapping) else type(initial).__name__
    raise LoRAError(
        'checkpoint["lora"]: expected `initial` to hold, by name, the initial values of heads, biases and other whole '
        f"tensors that were trained, found {shown}; the file is damaged or belongs to another model."
    )
