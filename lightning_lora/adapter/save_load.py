"""read_adapter, take_adapter, save_adapter, load_adapter, load_from_checkpoint: adapters out of and into models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.rank_sync import RankSync, writes_files
from ..distributed.sharding import copies_of
from ..errors import LoRAError
from ..files.paths import PathLike
from ..files.torch_archive import read_torch_file
from ..model.adapted_model import AdaptedModel, Listing, find_in, find_model, open_model
from ..model.inject import inject, inject_to_load, unload
from ..model.live_state import LiveState, open_state
from ..model.merging import holds_merged, merge_listed, unmerge_listed
from ..model.targets import Targets
from ..model.wrappers import unwrapped, warn_of_late_adapters
from ..nn.writer import Turn
from .adapter import (
    Adapter,
    exact_options,
    options_hold,
)
from .apply import (
    Names,
    add_frozen_weights,
    align_names,
    by_first_names,
    check_adapter,
    copy_values,
    specs_for,
    split_off_base,
)
from .build_module import build_module
from .checkpoint_of_model import prepare_for_load
from .fingerprint import REMEDY, warn_of_rounding
from .lightning_checkpoint import adapter_of
from .peft_attention import turn_as_in_model
from .peft_folder import write_folder
from .peft_parameters import order_in
from .peft_saved_modules import frozen_in_saved
from .sources import adapter_with_options, read_source, saved_modules
from .take import adapter_of_model, check_fingerprint, frozen_values

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


def read_adapter(source: PathLike | Mapping[str, Any] | Adapter) -> Adapter:
    """Read an adapter into memory, with its options, for load_adapter, save_adapter, combine and plot_adapter.

    Args:
        source: any form of adapter that load_adapter takes. The adapter shares the memory of tensors in a dictionary.

    Returns:
        The adapter, by the names in the source. It does not change; loading it copies its values.

    Raises:
        LoRAError: the source is damaged or of no such form, or only a model tells what its tensors are.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> save_adapter(model, "formal")
        >>> save_adapter(model, "casual")
        >>> styles = {name: read_adapter(name) for name in ("formal", "casual")}
        >>> load_adapter(model, styles["casual"])  # in place of the adapter that the model has
        ['0', '2']
    """
    return read_source(source, verb="read_adapter")


def take_adapter(model: nn.Module) -> Adapter:
    """Copy the adapter of a model, merged or not, for load_adapter, save_adapter, combine and plot_adapter.

    Collective where the model is sharded.

    Returns:
        The adapter, with its options and all else that training can change. It does not change with the model.

    Raises:
        LoRAError: the model was not injected, or its factors are not finite.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> before = take_adapter(model)
        >>> nn.init.ones_(model[0].lora_B)[0, 0].item()  # stands in for training
        1.0
        >>> names = load_adapter(model, before)  # the adapter as it was, bit for bit
        >>> model[0].lora_B.count_nonzero().item()
        0
    """
    shared = adapter_of_model(LiveState(open_model(model, "take_adapter")), "take_adapter")
    return replace(shared, tensors=_copied(shared.tensors))


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy tensors and extra state."""
    copies = copies_of({name: value for name, value in values.items() if isinstance(value, torch.Tensor)})
    return {name: copies[name] if name in copies else copy.deepcopy(value) for name, value in values.items()}


def save_adapter(model: nn.Module | Adapter, path: PathLike) -> None:
    """Write an adapter as a folder in PEFT's format. Collective where the model is sharded.

    Args:
        model: an injected model, or an adapter of read_adapter or take_adapter.
        path: the folder; what else is in it stays.

    Raises:
        LoRAError: the model was not injected, or PEFT has no equal of one of its layers.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> save_adapter(model, "adapter")
        >>> import os
        >>> sorted(os.listdir("adapter"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if isinstance(model, Adapter):
        write_folder(adapter_with_options(model, where="save_adapter"), path)
        return
    live = LiveState(open_model(model, "save_adapter"))
    adapter = adapter_of_model(live, "save_adapter")
    frozen = frozen_values(live, [adapter.network + name for name in frozen_in_saved(adapter.by_network_names())])
    network_frozen = {name.removeprefix(adapter.network): value for name, value in frozen.items()}
    sync = RankSync(layer.main_weight() for layer in live.handle.layers.values())
    writes = writes_files(module for _, module in live.handle.modules)
    sync.run("save_adapter", (lambda: write_folder(adapter, path, network_frozen)) if writes else None)
    sync.raise_on_any_rank()


def load_adapter(
    model: nn.Module, source: PathLike | Mapping[str, Any] | Adapter, *, strict_base: bool = True
) -> list[str]:
    """Put an adapter onto a model, injected or not. In place.

    An injected model takes the adapter's ranks and scalings, merged or not; its parameters stay the same objects.

    Args:
        model: a model with the base that the adapter was trained on.
        source: an adapter of read_adapter or take_adapter, a PEFT folder, a Lightning checkpoint of any kind, a file
            with a state dict, or a state dict; also one of a PeftModel, or of a LightningModule that holds one, or a
            dictionary with such a state dict in an entry, as Fabric saves it. A source without options (a bare state
            dict) needs an injected model, whose options then hold.
        strict_base: whether another base than the adapter's is an error or a warning.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: the source is damaged or does not fit; the model is as it was.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> save_adapter(model, "adapter")
        >>> unload(model)
        >>> load_adapter(model, "adapter")
        ['0', '2']
    """
    listing = Listing(unwrapped(model, "load_adapter"))
    adapter = read_source(source, order_in(listing.model))
    handle = find_in(listing)
    if handle is None:
        warn_of_late_adapters(model, "load_adapter")
    return apply_adapter(handle or listing, adapter, strict_base=strict_base, swap=True)


def load_from_checkpoint(
    cls: type[Module], path: PathLike, *, weights_only: bool | None = None, strict_base: bool = True, **kwargs: Any
) -> Module:
    """Build a LightningModule from a checkpoint's hyperparameters, as Lightning does, and load its adapter.

    The base weights are those that the class builds; for a full checkpoint, those in the file.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint of any kind that this package wrote.
        weights_only: as in Lightning's own load_from_checkpoint; with False, objects in the hyperparameters are
            unpickled, and what a LightningCLI named there is imported and called, which may run any code. Without that
            each such hyperparameter must be among `kwargs`.
        strict_base: whether another base than the adapter's is an error or a warning.
        kwargs: hyperparameters that override the saved ones.

    Raises:
        LoRAError: the file is damaged, has no adapter, belongs to another base, or its hyperparameters hold objects or
            name code.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Net(BoringModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         for parameter in self.parameters():
        ...             nn.init.ones_(parameter)  # stands in for loading pretrained weights
        >>> trainer = L.Trainer(max_steps=2, callbacks=[LoRACallback(r=1)], barebones=True)
        >>> trainer.fit(model := Net())
        >>> trainer.save_checkpoint("adapter.ckpt")
        >>> loaded = load_from_checkpoint(Net, "adapter.ckpt")
        >>> torch.equal(loaded.layer.lora_B, model.layer.lora_B)
        True
    """
    if not isinstance(cls, type) or not hasattr(cls, "load_from_checkpoint"):
        found = cls.__name__ if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise LoRAError(f"load_from_checkpoint: expected the class of a LightningModule, found {found}.")
    checkpoint = read_torch_file(path, trusted=weights_only is False)
    adapter, kind = adapter_of(checkpoint)
    model: Module = build_module(cls, path, checkpoint, weights_only, kwargs)
    if kind != "full":
        remedy = (
            f"{cls.__name__} built a base of its own. Where the base is a checkpoint, load that first: load_adapter("
            f'model := {cls.__name__}.load_from_checkpoint("pretrained.ckpt"), "{path}"). strict_base=False makes this '
            "a warning."
        )
        apply_adapter(find_model(model) or Listing(model), adapter, strict_base=strict_base, remedy=remedy)
        return model
    listing = find_model(model) or Listing(model)
    config = _config_for(listing, by_first_names(Names(listing.places), adapter))
    if isinstance(listing, AdaptedModel):
        inject(model, config)
    else:
        inject_to_load(listing, config)
    prepare_for_load(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def apply_adapter(
    listing: Listing,
    adapter: Adapter,
    *,
    strict_base: bool = True,
    remedy: str = REMEDY,
    swap: bool = False,
) -> list[str]:
    """Put an adapter onto a model: inject where that is still to do, check everything, then copy the values. In place.

    Args:
        listing: of the model without wrappers; its handle where it is injected.
        adapter: under any prefix.
        strict_base: whether another base than the adapter's is an error or a warning.
        remedy: what the error about another base says that its reader can do.
        swap: whether layers of an injected model may get another rank and scaling.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    names = Names(listing.places)
    adapter = by_first_names(names, align_names(listing, names, adapter))
    fresh = not isinstance(listing, AdaptedModel)
    if isinstance(listing, AdaptedModel):
        handle = listing
        _tell_of_options(handle, adapter)
    else:
        handle = inject_to_load(listing, _config_for(listing, adapter), adapter.scope)
    adapter = turn_as_in_model(adapter, handle.kinds)
    with Turn("load_adapter", [handle.record.writer]):
        was_merged = holds_merged(handle.layers.values())
        try:
            if was_merged:
                unmerge_listed(handle)  # at once, because to read W out of W' takes as long
            live = open_state(handle)
            adapter = add_frozen_weights(live, split_off_base(live, adapter))
            specs = {} if fresh or not swap else specs_for(handle, by_first_names(names, adapter))
            check_adapter(live, names, adapter, specs=specs)
            present = check_fingerprint(live, adapter.fingerprint, strict=strict_base, remedy=remedy)
            copy_values(live, adapter, specs, merge_after=was_merged)
            handle.record.origin = dict(adapter.origin)
        except BaseException:
            if fresh:
                unload(handle.model)
            elif was_merged:
                merge_listed(handle)
            raise
    warn_of_rounding(present, adapter.fingerprint)
    return list(handle.layers)


def _tell_of_options(handle: AdaptedModel, adapter: Adapter) -> None:
    """Tell which options hold where a source has none."""
    if adapter.config is None:
        options = handle.record.config
        scale = f"lora_alpha={options.lora_alpha:g}, use_rslora={options.use_rslora}"
        log.info("lightning_lora: the source stores no options; those of the injected model hold: %s", scale)


def _config_for(listing: Listing, adapter: Adapter) -> LoRAConfig:
    """Return the adapter's options. Where they would choose other layers in this model, name the layers instead."""
    config, ranks = adapter.config, adapter.ranks()
    if config is None:
        stored = sorted(set(ranks.values()))
        saved = _leaves(saved_modules(adapter))
        raise LoRAError(
            "adapter: the source stores tensors and no options, as loralib's files do. Its factors have rank "
            f"{' and '.join(map(str, stored))}; lora_alpha is nowhere in it and must come from whoever trained it. "
            f"Call inject(model, LoRAConfig(r={stored[0]}, lora_alpha=..., target_modules=[{_leaves(ranks)}]"
            f"{f', modules_to_save=[{saved}]' if saved else ''})) first, then load_adapter again."
        )
    targets = Targets(listing.modules, config, adapter.scope)
    same_layers = not targets.unmatched and targets.names() == set(ranks)
    same = same_layers and options_hold(config, ranks, adapter.scalings)
    config = config if same else exact_options(config, ranks, adapter.scalings, adapter.parameters)
    same_rows = targets.tables.items() >= adapter.tables.items()
    return config if same_rows else replace(config, trainable_token_indices=dict(adapter.tables))


def _leaves(modules: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(module.rpartition(".")[2] for module in modules)))
