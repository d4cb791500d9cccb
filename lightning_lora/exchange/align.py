"""An adapter as one model needs it: under the model's names, without base weights, with all that it trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import fingerprint_entries
from ..adapter.metadata import without
from ..formats.peft_equivalents import refuse_conv1d_of_model
from ..formats.peft_parameters import Order, stacks_as_in_model, usual_order
from ..model.adapted_model import AdaptedModel, Listing
from ..model.foreign_state import foreign_entries, without_base
from ..model.live_state import LiveState, original_value
from ..model.named_state import EXTRA_STATE, has_extra_state
from ..model.pretrained import pretrained_models, tied_to_input
from ..names import names_factor
from ..nn.adapted_module import is_factor
from ..nn.foreign_entries import ForeignEntries
from ..nn.low_rank import CONV1D
from ..nn.parameter import weights_of
from ..nn.variant import rows_leaf
from ..notices import tell
from .first_names import Names
from .pretrained_names import align_to_networks
from .resized_tables import has_new_rows


def order_in(model: nn.Module) -> Order:
    """Return the order in which the modules of a model register parameters."""

    def order(parameters: Collection[str]) -> Sequence[str] | None:
        for module in model.modules():
            if module._parameters.keys() >= set(parameters):
                return [name for name in module._parameters if name in parameters]
        return usual_order(parameters)

    return order


def align_names(listing: Listing, names: Names, adapter: Adapter) -> Adapter:
    """Return the adapter under the one prefix at which its layers are modules of the model.

    The extra state of a linear layer, as Transformer Engine's have one, is left out where the layer here has none. A
    bare state dict without layers has this model's own names, where the model has an adapter without layers.
    """
    layers, own = adapter.layers, isinstance(listing, AdaptedModel) and not listing.layers and adapter.config is None
    if (not layers and not own) or not all(layer in names.modules for layer in layers):
        modules = {*names.modules, *(weights_of(names.modules) if adapter.parameters else ())}
        adapter = align_to_networks(adapter, modules, listing, names.first)
    owners = {name: names.modules.get(name.rpartition(".")[0]) for name in adapter.tensors if EXTRA_STATE in name}
    left_out = [name for name, owner in owners.items() if isinstance(owner, nn.Linear) and not has_extra_state(owner)]
    return replace(adapter, tensors=without(adapter.tensors, left_out)) if left_out else adapter


def as_in_model(adapter: Adapter, kinds: Mapping[str, str]) -> Adapter:
    """Return an adapter of PEFT's with factors as a model with layers of these kinds has them."""
    if adapter.peft_version is None:
        return adapter
    refuse_conv1d_of_model(adapter, next((name for name, kind in kinds.items() if kind == CONV1D), None), "adapter")
    return stacks_as_in_model(adapter, kinds)


def split_off_base(live: LiveState, adapter: Adapter) -> Adapter:
    """Decide with a model which whole tensors of a source are those of its base. The others are the adapter's.

    Of PEFT that is what it wrote beside the adapter, and of a whole state dict all that is frozen here. Embeddings with
    new rows were resized and are the adapter's. Single base weights in a state dict are its own too: the user trained
    them.

    Raises:
        LoRAError: the embeddings of the model have another number of rows.
    """
    base, tensors = dict(adapter.base), {**adapter.tensors, **adapter.base}
    if adapter.config is None and tensors.keys() >= {n for n, _, owner in live.entries if not is_factor(n, owner)}:
        base = tensors
    if not base:
        return adapter
    trained = set(live.changing) - live.handle.initial_of("resized").keys()
    of_base = set()
    for name, tensor, owner in live.entries:
        if name not in base or name in trained or tensor is None:
            continue
        if has_new_rows(name, base[name], original_value(name, tensor, owner)):
            tell(f"lightning_lora: {name} comes with the adapter: its last rows are not the base's")
        else:
            of_base.add(name)
    new = fingerprint_entries((name, base[name]) for name in sorted(of_base - adapter.fingerprint.keys()))
    entries = {**without(adapter.fingerprint, base.keys() - of_base), **new}
    return replace(adapter, tensors=without(tensors, of_base), base={}, fingerprint=entries)


def split_off_foreign(live: LiveState, adapter: Adapter) -> Adapter:
    """Take what modules of this model write of their own out of a source's tensors, as of a state dict."""
    unknown = adapter.tensors.keys() - live.tensors.keys()
    known = foreign_entries(live.handle) if unknown else ForeignEntries()
    values = {name: adapter.tensors[name] for name in unknown & known.values.keys()}
    foreign = adapter.foreign
    if values:
        foreign = ForeignEntries({**foreign.values, **values}, {**known.versions, **foreign.versions})
    return replace(adapter, tensors=without(adapter.tensors, values), foreign=without_base(live.handle, foreign))


def add_frozen_weights(live: LiveState, adapter: Adapter) -> Adapter:
    """Add tensors that this model saves with its adapter, and that the source does not hold.

    A base weight that is trained here and was frozen there gets its initial value. Rows of a table are added under the
    names of the tables that are tied to it, but for those that PEFT left alone: check_adapter refuses these.
    """
    unfrozen = live.handle.initial_of("unfrozen", "resized")
    frozen = {name: value for name, value in unfrozen.items() if name in adapter.fingerprint}
    shared = _names_of_shared(live)
    stored = {other: value for name, value in adapter.tensors.items() for other in shared.get(name, ())}
    resized = {name: stored.get(name, value) for name, value in live.handle.initial_of("resized").items()}
    alone = _left_alone(live, adapter)
    tied = {name: value for name, value in stored.items() if names_factor(name) and name not in alone}
    added = {**frozen, **resized, **tied}
    return replace(adapter, tensors={**added, **adapter.tensors}) if added.keys() - adapter.tensors.keys() else adapter


def _left_alone(live: LiveState, adapter: Adapter) -> set[str]:
    """Return the names of trained rows here that the tables had frozen where PEFT trained the adapter.

    PEFT follows ties from a transformers model's input embeddings alone: rows of its output head are the head's own.
    """
    modules, stored, leaf = live.handle.modules, adapter.rows(), rows_leaf()
    if adapter.peft_version is None or not stored:
        return set()
    ties = {end: table for name in pretrained_models(modules) for end, table in tied_to_input(modules, name).items()}
    followed = {*stored, *(end for end, table in ties.items() if table in stored)}
    return {f"{name}.{leaf}" for name, _ in modules if name not in followed}


def _names_of_shared(live: LiveState) -> dict[str, list[str]]:
    """Return, for each name of a tensor with several names, all of these names."""
    names: dict[int, list[str]] = {}
    for name, tensor in live.tensors.items():
        if tensor is not None:
            names.setdefault(id(tensor), []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def record_trained(live: LiveState, adapter: Adapter) -> None:
    """Record base parameters that the adapter holds as trained, with their present values as initial ones."""
    whole = [name for name in adapter.tensors if not names_factor(name) and name in live.tensors]
    if any(isinstance(live.tensors[name], nn.Parameter) for name in whole):
        live.handle.record_unfrozen(whole)
