"""The folder of a transformers model: its configuration, and the names and parts of tensors in its files.

A tensor in a file may have another name than in the model, or be a part of a tensor. transformers converts tensors when
it loads, and converts them back when it saves. Here what is only renamed stays as it is, and the rest is converted one
by one, or by layers, so that few are in memory at once.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..errors import LoRAError
from ..files.paths import PathLike, kind_of
from ..formats.forms import CONFIG_FILE
from ..model.adapted_model import AdaptedModel, Listing
from ..model.live_state import open_state
from ..model.pretrained import (
    CONVERSIONS,
    QUANTIZATION_CONFIG,
    is_pretrained_model,
    plain_conversions,
    pretrained_models,
)
from ..names import is_lightning_module, parent_names

Tensors = dict[str, torch.Tensor]
Convert = Callable[[Tensors], Tensors]


class Part(NamedTuple):
    """Tensors of a model that are stored together.

    Attributes:
        names: in the model.
        stored: by the file's names, on the meta device.
        convert: makes the stored tensors out of the model's.
    """

    names: list[str]
    stored: Tensors
    convert: Convert

    @property
    def nbytes(self) -> int:
        """The size of the stored tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.stored.values())


def find_network(listing: Listing) -> tuple[str, Any] | None:
    """Return the prefix and the transformers model: the model itself, or the one inside a LightningModule.

    The transformers model holds all that training changes. If something outside of it was trained, a warning says so.

    Args:
        listing: of any module; its handle, where it holds all of an injected model.

    Returns:
        The prefix and the model, or None where there is none, or something outside of it was trained.
    """
    model = listing.model
    if is_pretrained_model(model):
        return "", model
    if not is_lightning_module(model):
        return None
    parameters = {name: tensor for name, tensor, _ in listing.state() if isinstance(tensor, nn.Parameter)}
    names = set(open_state(listing).changing) if isinstance(listing, AdaptedModel) else set()
    trained = {id(tensor) for name, tensor in parameters.items() if name in names or tensor.requires_grad}
    networks = pretrained_models(listing.modules)
    inside = {name: {id(parameter) for parameter in network.parameters()} for name, network in networks.items()}
    name = max(inside, key=lambda name: len(trained & inside[name]), default="")
    if not name or not trained & inside[name]:
        return None
    outside = [other for other, parameter in parameters.items() if id(parameter) in trained - inside[name]]
    if outside:
        warnings.warn(
            f"lightning_lora: save_merged: {outside[0]!r} was trained outside of the transformers model {name!r}, so "
            f"the folder holds all of {type(model).__name__} under its own names, which from_pretrained does not read. "
            f"save_merged(module.{name}, path) writes the transformers model alone.",
            stacklevel=3,
        )
        return None
    of_networks = set().union(*inside.values())
    left_out = [other for other, parameter in parameters.items() if id(parameter) not in of_networks]
    if left_out:
        warnings.warn(
            f"lightning_lora: save_merged: {left_out[0]!r} is outside of the transformers model {name!r} and left out "
            f"({len(left_out)} such parameters).",
            stacklevel=3,
        )
    return f"{name}.", networks[name]


def refuse_adapter_beside(path: PathLike) -> None:
    """Raise LoRAError where a folder holds an adapter, which from_pretrained would add to the merged weights."""
    if kind_of(Path(path) / CONFIG_FILE) != "nothing":
        raise LoRAError(
            f"{path}: holds {CONFIG_FILE}, with which from_pretrained loads that adapter and its base "
            "instead of merged weights; give another folder, or remove the adapter's files."
        )


def write_configuration(network: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write what transformers' save_pretrained writes beside the weights; the live configuration stays as it is.

    Args:
        network: the model.
        folder: where to.
        dtype: in which to load the folder, where quantized weights of the model are plain there.
    """
    config = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__.removeprefix("FSDP")]
    stored = str(dtype or network.dtype).removeprefix("torch.")
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", stored)
    if dtype is not None:
        vars(config).pop(QUANTIZATION_CONFIG, None)
    if getattr(network, "_auto_class", None) is not None:  # a class that is in no package travels as its source
        importlib.import_module("transformers.dynamic_module_utils").custom_object_save(network, folder, config=config)
    config.save_pretrained(folder)
    if network.can_generate():
        network.generation_config.save_pretrained(folder)


def parts_in_files(network: Any, state: Mapping[str, torch.Tensor]) -> list[Part]:
    """Divide the tensors of a transformers model into small groups that can be converted by themselves.

    Args:
        network: the model.
        state: its tensors by name; of these only identity, shape and dtype are used.
    """
    tied = getattr(network, "all_tied_weights_keys", None) or {}  # of transformers 5: the second name of each
    ignored = getattr(network, "_keys_to_ignore_on_save", None) or ()
    kept = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in state.items()
        if name not in ignored and state.get(tied.get(name, "")) is not tensor
    }
    convert = _conversion(network)
    whole = Part(list(kept), convert(dict(kept)), convert)
    names = {id(tensor): name for name, tensor in kept.items()}
    renamed = [_renamed(names[id(value)], new, value) for new, value in whole.stored.items() if id(value) in names]
    as_they_are = {name for part in renamed for name in part.names}
    changed = [name for name in kept if name not in as_they_are]
    order = {name: number for number, name in enumerate(kept)}
    for groups in ([[name] for name in changed], _by_layer(changed)):
        with suppress(Exception):  # a conversion may raise anything if a part that it needs is missing
            made = [Part(group, convert({name: kept[name] for name in group}), convert) for group in groups]
            parts = [part for part in (*renamed, *made) if part.stored]
            if _layout(parts) == _layout([whole]):
                return sorted(parts, key=lambda part: order[part.names[0]])
    return [whole]


def one_part_each(state: Mapping[str, torch.Tensor]) -> list[Part]:
    """Return the parts of tensors that are stored as they are."""
    return [_renamed(name, name, tensor) for name, tensor in state.items()]


def _renamed(name: str, new: str, tensor: torch.Tensor) -> Part:
    """Return the part of a tensor that is stored as it is, under a name of its own in the file."""
    return Part([name], {new: tensor}, lambda tensors: {new: tensors.pop(name)})


def _conversion(network: Any) -> Convert:
    """Return the conversion from a model's tensors to a file's. Before transformers 5 they are the same."""
    try:
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return dict
    if CONVERSIONS in vars(network):
        network = copy.copy(network)
        vars(network)[CONVERSIONS] = plain_conversions(network)
    return cast(Convert, partial(loading.revert_weight_conversion, network))


def _layout(parts: Iterable[Part]) -> list[tuple[str, str]]:
    """Return the name, and the dtype and shape, of all that is stored."""
    stored = (item for part in parts for item in part.stored.items())
    return sorted((name, f"{tensor.dtype} {tuple(tensor.shape)}") for name, tensor in stored)


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Group names by the innermost numbered module that they are in."""
    groups: dict[str, list[str]] = {}
    for name in names:
        numbered = [module for module in parent_names(name) if module.rpartition(".")[2].isdigit()]
        groups.setdefault(numbered[-1] if numbered else "", []).append(name)
    return list(groups.values())
