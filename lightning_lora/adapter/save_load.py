"""save_adapter, load_adapter and load_from_checkpoint: adapters out of and into models, in any form."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.rank_sync import RankSync, writes_files
from ..errors import LoRAError
from ..files.paths import PathLike, given_path, kind_of
from ..files.torch_archive import read_torch_file
from ..model.inject import inject, inject_to_load, unload
from ..model.injection import find_injection, require_injection
from ..model.merging import is_merged, merge, unmerge
from ..model.targets import Targets
from ..model.wrappers import unwrapped, warn_of_late_adapters
from ..names import META, listed, names_factor
from ..nn.adapted_weights import adapted_layers
from ..nn.layer_kinds import layer_kinds
from ..nn.writer import Turn
from .adapter import (
    Adapter,
    check_factors,
    describe_value,
    exact_options,
    is_plain,
    nothing_adapted,
    options_hold,
    require_values,
)
from .apply import (
    add_frozen_weights,
    align_names,
    by_first_names,
    check_adapter,
    copy_values,
    specs_for,
    split_off_base,
    without_base,
)
from .build_module import build_module
from .fingerprint import REMEDY, warn_of_rounding
from .hyper_parameters import HYPER_PARAMETERS
from .lightning_checkpoint import adapter_of, prepare_for_load
from .metadata import adapter_of_model, frozen_values
from .peft_attention import turn_as_in_model, turn_without_model
from .peft_folder import read_folder, read_tensor_file, write_folder
from .peft_names import are_peft_names
from .peft_parameters import Order, order_in, usual_order
from .peft_saved_modules import frozen_in_saved
from .peft_state_dict import read_state

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


def save_adapter(model: nn.Module, path: PathLike) -> None:
    """Write the adapter as a folder in PEFT's format. Collective where the model is sharded.

    Raises:
        LoRAError: the model was not injected, or PEFT has no equal of one of its layers.
    """
    model = unwrapped(model, "save_adapter")
    adapter = adapter_of_model(model)
    frozen = frozen_values(model, [adapter.network + name for name in frozen_in_saved(adapter.by_network_names())])
    network_frozen = {name.removeprefix(adapter.network): value for name, value in frozen.items()}
    sync = RankSync(layer.main_weight() for layer in adapted_layers(model).values())
    writes = writes_files(model)
    sync.run("save_adapter", (lambda: write_folder(adapter, path, network_frozen)) if writes else None)
    sync.raise_on_any_rank()


def load_adapter(model: nn.Module, source: PathLike | Mapping[str, Any], *, strict_base: bool = True) -> list[str]:
    """Put a saved adapter onto a model, injected or not. In place.

    An injected model takes the adapter's ranks and scalings, merged or not; its parameters stay the same objects.

    Args:
        model: a model with the base that the adapter was trained on.
        source: a PEFT folder, a Lightning checkpoint of any kind, a file with a state dict, or a state dict; also one
            of a PeftModel, or of a LightningModule that holds one, or a dictionary with such a state dict in an entry,
            as Fabric saves it. A source without options (a bare state dict) needs
            an injected model, whose options then hold.
        strict_base: whether another base than the adapter's is an error or a warning.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: the source is damaged or does not fit; the model is as it was.
    """
    network = unwrapped(model, "load_adapter")
    adapter = read_adapter(source, order_in(network))
    if find_injection(network) is None:
        warn_of_late_adapters(model, "load_adapter")
    return apply_adapter(network, adapter, strict_base=strict_base, swap=True)


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
        apply_adapter(model, adapter, strict_base=strict_base, remedy=remedy)
        return model
    config = _config_for(model, by_first_names(model, adapter))
    (inject if find_injection(model) else inject_to_load)(model, config)
    prepare_for_load(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def apply_adapter(
    model: nn.Module, adapter: Adapter, *, strict_base: bool = True, remedy: str = REMEDY, swap: bool = False
) -> list[str]:
    """Put an adapter onto a model: inject where that is still to do, check everything, then copy the values. In place.

    Args:
        model: injected or not.
        adapter: under any prefix.
        strict_base: whether another base than the adapter's is an error or a warning.
        remedy: what the error about another base says that its reader can do.
        swap: whether layers of an injected model may get another rank and scaling.

    Returns:
        The names of the adapted layers.

    Raises:
        LoRAError: something does not fit; the model is as it was.
    """
    adapter = by_first_names(model, align_names(model, adapter))
    fresh = find_injection(model) is None
    if fresh:
        inject_to_load(model, _config_for(model, adapter), adapter.scope)
    elif adapter.config is None:
        options = require_injection(model, "load_adapter").record.config
        scale = f"lora_alpha={options.lora_alpha:g}, use_rslora={options.use_rslora}"
        log.info("lightning_lora: the source stores no options; those of the injected model hold: %s", scale)
    adapter = turn_as_in_model(adapter, layer_kinds(model))
    record = require_injection(model, "load_adapter").record
    with Turn("load_adapter", [record.writer]):
        was_merged = is_merged(model)
        try:
            if was_merged:
                unmerge(model)  # at once, because to read W out of W' takes as long
            adapter = add_frozen_weights(model, split_off_base(model, adapter))
            specs = {} if fresh or not swap else specs_for(model, by_first_names(model, adapter))
            present = check_adapter(model, adapter, strict_base=strict_base, remedy=remedy, specs=specs)
            copy_values(model, adapter, specs, merge_after=was_merged)
            record.origin = dict(adapter.origin)
        except BaseException:
            if fresh:
                unload(model)
            elif was_merged:
                merge(model)
            raise
    warn_of_rounding(present, adapter.fingerprint)
    return list(adapted_layers(model))


def _config_for(model: nn.Module, adapter: Adapter) -> LoRAConfig:
    """Return the adapter's options, with the layers spelled out where they would choose others under this prefix."""
    config, ranks = adapter.config, adapter.ranks()
    if config is None:
        stored = sorted(set(ranks.values()))
        saved = _leaves(_saved_modules(adapter))
        raise LoRAError(
            "adapter: the source stores tensors and no options, as loralib's files do. Its factors have rank "
            f"{' and '.join(map(str, stored))}; lora_alpha is nowhere in it and must come from whoever trained it. "
            f"Call inject(model, LoRAConfig(r={stored[0]}, lora_alpha=..., target_modules=[{_leaves(ranks)}]"
            f"{f', modules_to_save=[{saved}]' if saved else ''})) first, then load_adapter again."
        )
    targets = Targets(model, config, adapter.scope)
    same_layers = not targets.unmatched and targets.names() == set(ranks)
    same = same_layers and options_hold(config, ranks, adapter.scalings)
    config = config if same else exact_options(config, ranks, adapter.scalings, adapter.parameters)
    same_rows = targets.tables.items() >= adapter.tables.items()
    return config if same_rows else replace(config, trainable_token_indices=dict(adapter.tables))


def _saved_modules(adapter: Adapter) -> list[str]:
    """Return the modules that an adapter without options holds whole."""
    whole = adapter.beside_factors().keys() - adapter.perhaps_base
    modules = dict.fromkeys(name.rpartition(".")[0] for name in sorted(whole) if name.endswith(".weight"))
    return [module for module in modules if module not in adapter.layers()]


def _leaves(modules: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(module.rpartition(".")[2] for module in modules)))


def read_adapter(source: PathLike | Mapping[str, Any], order: Order = usual_order) -> Adapter:
    """Read an adapter in any of the forms that load_adapter takes, given the order of modules' parameters.

    Raises:
        LoRAError: the source is damaged or of no such form.
    """
    if isinstance(source, (str, os.PathLike)):
        if kind_of(given_path(source)) == "folder":
            return read_folder(source, order)
        if Path(source).suffix == ".safetensors":
            return read_tensor_file(source)
        adapter = _read_state(read_torch_file(source))
        require_values(adapter, str(source))
        return adapter
    if not isinstance(source, Mapping):
        raise LoRAError(f"load_adapter: expected a path or a state dict, found {type(source).__name__}.")
    return _read_state(source)


def _read_state(source: Mapping[str, Any]) -> Adapter:
    """Return the adapter in a checkpoint or a state dict."""
    if META in source:
        return adapter_of(source)[0]
    tensors = _tensors_in(source.get("state_dict", source))
    if are_peft_names(tensors):
        return read_state(tensors, "adapter", source.get(HYPER_PARAMETERS))
    adapter = Adapter(tensors)
    check_factors(adapter, "adapter")
    return adapter


def _tensors_in(state: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, or of the only entry with an adapter of a dictionary of them, as Fabric's.

    Raises:
        LoRAError: several entries have one, or there are no tensors.
    """
    if not isinstance(state, Mapping):
        raise LoRAError(f"load_adapter: expected a state dict, found {type(state).__name__}.")
    tensors = _named_tensors(state)
    if _name_adapter(tensors):
        return tensors
    below = {key: _named_tensors(value) for key, value in state.items() if isinstance(value, Mapping)}
    found = {key: inside for key, inside in below.items() if _name_adapter(inside)}
    if len(found) > 1:
        first, second, *_ = found
        raise LoRAError(
            f"load_adapter: {first!r} and {second!r} hold an adapter each; pass the one that you want, as "
            f"load_adapter(model, checkpoint[{first!r}])."
        )
    if not found and not tensors and state:
        raise LoRAError(
            f"load_adapter: the source holds no lora_A, neither by itself nor in an entry; it holds "
            f"{listed(list(map(repr, state)))}."
        )
    return next(iter(found.values()), tensors)


def _named_tensors(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _name_adapter(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(map(names_factor, tensors)) or are_peft_names(tensors)


def adapter_with_options(
    source: PathLike | Mapping[str, Any], lora_alpha: float | None = None, where: str = ""
) -> Adapter:
    """Read an adapter that is to be applied without a model at hand.

    Args:
        source: any form of adapter.
        lora_alpha: for one that does not store it, as loralib's do not.
        where: what messages call it; a path by default.

    Raises:
        LoRAError: lora_alpha is missing, or is stored and given.
    """
    path = where or source
    adapter = turn_without_model(without_base(read_adapter(source)), path)
    require_values(adapter, str(path))
    ranks = adapter.ranks()
    if not ranks:
        raise LoRAError(f"{path}: holds {nothing_adapted(adapter)}; it is not an adapter of a known format.")
    for name, value in adapter.beside_factors().items():
        if isinstance(value, torch.Tensor) and not is_plain(value):
            raise LoRAError(f"{path}: {name!r} must be a dense tensor, found {describe_value(value)}.")
    if adapter.rows() and not adapter.tables:
        raise LoRAError(f"{path}: stores rows of {next(iter(adapter.rows()))!r}, and not which rows these are.")
    if adapter.config is not None:
        if lora_alpha is not None:
            raise LoRAError(f"{path}: stores its lora_alpha; it cannot be given another.")
        return adapter
    if lora_alpha is None:
        raise LoRAError(
            f"{path}: stores tensors and no options, as loralib's files do: lora_alpha is nowhere in it. Ask whoever "
            "trained it, and pass --lora-alpha to merge, export or import; what export writes holds it, for others."
        )
    for name in ranks:
        if adapter.is_placed(name) and adapter.acting(name).a.shape[0] != adapter.acting(name).b.shape[1]:
            raise LoRAError(
                f"{path}: {name!r} adapts parts of a fused projection, and which is not stored; load it in Python onto "
                "a model injected with enable_lora."
            )
    scalings = {name: lora_alpha / rank for name, rank in ranks.items()}
    saved = _saved_modules(adapter)
    config = LoRAConfig(
        r=next(iter(ranks.values())),
        lora_alpha=lora_alpha,
        target_modules=list(ranks),
        modules_to_save=saved,
        **adapter.variant.options(),
    )
    if not options_hold(config, ranks, scalings):
        config = exact_options(config, ranks, scalings)
    return replace(adapter, config=config, scalings=scalings)
