"""An adapter as one model needs it: under its names, without its base, with what it saves beside an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.fingerprint import EQUAL, without_base
from ..adapter.layer_options import without_aliases
from ..distributed.sharding import is_sharded
from ..errors import LoRAError
from ..formats.pretrained_names import align_to_networks
from ..model.adapted_model import Listing
from ..model.live_state import LiveState, original_value
from ..model.pretrained import pretrained_models
from ..model.targets import weights_of
from ..names import names_factor
from ..nn.adapted_module import is_factor

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
        refuse_other_rows(name, stored, live)
    if stored.shape != live.shape or not stored.dim() or is_sharded(live) or live.is_meta:
        return False  # the fingerprint is compared instead
    relative = max(EQUAL, *(torch.finfo(tensor.dtype).eps for tensor in (stored, live)))
    rows = torch.isclose(stored.float(), live.float().cpu(), rtol=relative).reshape(len(stored), -1).all(1)
    same = int(rows.long().cumprod(0).sum())
    return len(rows) / 2 <= same < len(rows)


def refuse_other_rows(name: str, stored: torch.Tensor, live: torch.Tensor) -> None:
    """Raise LoRAError where a stored table and the model's differ in nothing but the number of rows."""
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


def record_trained(live: LiveState, adapter: Adapter) -> None:
    """Record base parameters that the adapter holds as trained, with their present values as initial ones."""
    whole = [name for name in adapter.tensors if not names_factor(name) and name in live.tensors]
    if any(isinstance(live.tensors[name], nn.Parameter) for name in whole):
        live.handle.record_unfrozen(whole)
