"""The public functions that bring adapters out of models and files, and back: read, take, save, load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.own_options import with_options
from ..adapter.renaming import by_network_names
from ..distributed.rank_sync import RankSync, writes_files
from ..errors import LoRAError
from ..files.paths import PathLike
from ..files.torch_archive import read_torch_file
from ..formats.forms import refuse_peft_folder
from ..formats.lightning_checkpoint import Kind, adapter_in_checkpoint
from ..formats.peft_folder import write_folder
from ..formats.peft_options import frozen_in_saved
from ..formats.plain import served_form
from ..formats.sources import read_source
from ..model.adapted_model import AdaptedModel, Listing, find_adapted, open_model
from ..model.attached import require_attached
from ..model.inject import inject_layers
from ..model.wrappers import refuse_trained_copies, unwrapped, warn_of_late_adapters
from ..names import META
from ..nn.attached_factors import Attachment
from ..nn.claims import claimed
from .align import order_in
from .apply import apply_adapter, new_injection, quantize_as_trained_
from .build_module import build_module, lines_by_hand
from .checkpoint_of_model import prepare_for_load
from .first_names import Names, by_first_names
from .take import adapter_of_model, attached_adapter, frozen_values
from .trained_with import attached_in, by_attach, refuse_missing

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


def take_adapter(model: nn.Module, *, name: str = "") -> Adapter:
    """Copy the adapter of a model, merged or not, for load_adapter, save_adapter, combine and plot_adapter.

    Collective where the model is sharded.

    Args:
        model: an injected model, or one with attached adapters.
        name: of an attached adapter. It is taken as trained, without its weight, in the form that every server takes:
            plain LoRA of one rank, with the scaling inside B. "" is the trained adapter.

    Returns:
        The adapter, with its options and all else that training can change. It does not change with the model.

    Raises:
        LoRAError: the model was not injected, or its factors are not finite; no adapter of this name is attached, or
            the form cannot express it.

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
    handle = open_model(model, "take_adapter", attached=bool(name))
    with claimed("take_adapter", handle.injection.claims):
        return _adapter_called(handle, name, "take_adapter")


def _adapter_called(handle: AdaptedModel, name: str, verb: str) -> Adapter:
    """Copy the trained adapter of a model, or an attached one in the served form."""
    if not name:
        return adapter_of_model(handle, verb)
    require_attached(handle, name, verb)
    return served_form(attached_adapter(handle, name), None, verb)


def save_adapter(model: nn.Module | Adapter, path: PathLike, *, name: str = "") -> None:
    """Write an adapter as a folder in PEFT's format, with a model card. Collective where the model is sharded.

    The card is README.md. It says how to load the adapter. A README.md that is there stays.

    Args:
        model: an injected model, or an adapter of read_adapter or take_adapter. What it holds now is written: after
            fit, the last epoch. export_adapter writes the best one, from its checkpoint.
        path: the folder. An adapter that is in it is replaced without asking; what else is in it stays.
        name: of an attached adapter of a model, as in take_adapter. "" is the trained one, which is written alone.

    Raises:
        LoRAError: the model was not injected, PEFT has no equal of one of its layers, or no adapter of this name is
            attached.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> save_adapter(model, "adapter")
        >>> import os
        >>> sorted(os.listdir("adapter"))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if isinstance(model, Adapter):
        if name:
            raise LoRAError(f"save_adapter: an adapter in memory is one alone, and has none of the name {name!r}.")
        write_folder(with_options(model, "save_adapter"), path)
        return
    handle = open_model(model, "save_adapter", attached=bool(name))
    with claimed("save_adapter", handle.injection.claims):
        _write(handle, _adapter_called(handle, name, "save_adapter"), path, plain=bool(name))


def _write(handle: AdaptedModel, adapter: Adapter, path: PathLike, *, plain: bool) -> None:
    """Write an adapter of a model as a folder, `plain` in the served form. Collective where the model is sharded."""
    frozen = {adapter.network + name for name in frozen_in_saved(by_network_names(adapter), "save_adapter")}
    adapter = replace(adapter, base=frozen_values(handle, frozen))
    sync = RankSync(layer.adapted_weight() for layer in handle.all_layers.values())
    writes = writes_files(module for _, module in handle.modules)
    write = partial(write_folder, adapter, path, plain=plain)
    sync.run("save_adapter", write if writes else None)
    sync.raise_on_any_rank()


def load_adapter(
    model: nn.Module, source: PathLike | Mapping[str, Any] | Adapter, *, strict_base: bool = True
) -> list[str]:
    """Put an adapter onto a model, injected or not. In place.

    An injected model takes the adapter's ranks and scalings, merged or not; its parameters stay the same objects.

    Args:
        model: a model with the base that the adapter was trained on.
        source: a PEFT folder, a Lightning checkpoint, a file with a state dict, a state dict, an adapter of
            read_adapter or take_adapter, or, with huggingface_hub installed, an id on the hub, as "user/repo". A
            source without options (a bare state dict) needs an injected model, whose options then hold. From a full
            checkpoint only the adapter is taken; load_from_checkpoint loads its base too.
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
    refuse_trained_copies(model, "load_adapter")
    adapter = read_source(source, order_in(listing.model))
    handle = find_adapted(listing)
    if handle is None:
        warn_of_late_adapters(model, "load_adapter")
    return apply_adapter(handle or listing, adapter, strict_base=strict_base, swap=True)


def load_from_checkpoint(
    cls: type[Module], path: PathLike, *, weights_only: bool | None = None, strict_base: bool = True, **kwargs: Any
) -> Module:
    """Build a LightningModule from a checkpoint's hyperparameters, as Lightning does, and load its adapter.

    The base weights are those that the class builds; for a full checkpoint, those in the file. Layers that were
    quantized by quantize_base or LoRACallback(quantize="nf4") are quantized here too.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint of any kind that this package wrote.
        weights_only: as in Lightning's own load_from_checkpoint. With False, objects in the hyperparameters are
            unpickled, and code that a LightningCLI named there is imported and called. This may run any code. Without
            it, each such hyperparameter must be among `kwargs`.
        strict_base: whether another base than the adapter's is an error or a warning.
        kwargs: hyperparameters that override the saved ones. `strict`, which Lightning's own takes, must be true.

    Raises:
        LoRAError: the file is damaged, has no adapter or another base, or its hyperparameters hold objects or code.

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
    refuse_peft_folder(path)
    if kwargs.pop("strict", True) is False:
        raise LoRAError(
            "load_from_checkpoint: strict=False would ignore tensors that do not fit, and an adapter is loaded "
            "whole or not at all; leave strict out. strict_base=False makes another base a warning."
        )
    checkpoint = read_torch_file(path, plain=[META], trusted=weights_only is False)
    adapter, kind = adapter_in_checkpoint(checkpoint)
    model: Module = build_module(cls, path, checkpoint, weights_only, kwargs)
    listing = find_adapted(model) or Listing(model)
    refuse_missing(attached_in(listing), adapter, partial(_by_hand, cls.__name__, path, kind))
    if kind != "full":
        quantize_as_trained_(listing, adapter)
        remedy = (
            f"{cls.__name__} built a base of its own. Build the module with the weights that it had in training, and "
            f'then load the adapter: load_adapter(model, "{path}"). strict_base=False makes this a warning.'
        )
        apply_adapter(listing, adapter, strict_base=strict_base, remedy=remedy)
    else:
        _load_full(model, checkpoint, adapter)
    return model


def _by_hand(name: str, path: PathLike, kind: Kind, missing: Mapping[str, Attachment]) -> str:
    """Return the advice where an adapter was trained with others attached, whose sources no checkpoint holds."""
    # The base of a full checkpoint is loaded after that: what was fully trained comes with it, and attach compares with
    # the values from before training.
    attaching = by_attach(missing, strict_base=kind != "full")
    return f"Load it by hand: {lines_by_hand(name, path, kind, attaching)}."


def _load_full(model: nn.Module, checkpoint: dict[str, Any], adapter: Adapter) -> None:
    """Inject a newly built model, and load base and adapter of a full checkpoint into it. In place."""
    if find_adapted(model) is None:
        listing = Listing(model)
        inject_layers(listing, new_injection(by_first_names(Names(listing.places), adapter)))
    prepare_for_load(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
