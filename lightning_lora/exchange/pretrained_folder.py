"""The folder of a transformers model: its configuration, and the names and parts of tensors in its files.

A tensor in a file may have another name than in the model, or be a part of a tensor. transformers converts tensors when
it loads, and converts them back when it saves. Here tensors are converted one by one, or in groups as small as
possible.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..errors import LoRAError
from ..files.paths import PathLike, given_path, kind_of
from ..formats.forms import CONFIG_FILE
from ..model.adapted_model import AdaptedModel, Listing
from ..model.live_state import open_state
from ..model.pretrained import (
    CONVERSIONS,
    QUANTISATION_CONFIG,
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
    names = set(open_state(listing).keys) if isinstance(listing, AdaptedModel) else set()
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
    if kind_of(given_path(path) / CONFIG_FILE) != "nothing":
        raise LoRAError(
            f"save_merged: {path} holds {CONFIG_FILE}, with which from_pretrained loads that adapter and its base "
            "instead of merged weights; give another folder, or remove the adapter's files."
        )


def write_configuration(network: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write what transformers' save_pretrained writes beside the weights; the live configuration stays as it is.

    Args:
        network: the model.
        folder: where to.
        dtype: in which to load the folder, where quantised weights of the model are plain there.
    """
    config = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__.removeprefix("FSDP")]
    stored = str(dtype or network.dtype).removeprefix("torch.")
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", stored)
    if dtype is not None:
        vars(config).pop(QUANTISATION_CONFIG, None)
    if getattr(network, "_auto_class", None) is not None:  # a class that is in no package travels as its source
        importlib.import_module("transformers.dynamic_module_utils").custom_object_save(network, folder, config=config)
    config.save_pretrained(folder)
    if network.can_generate():
        network.generation_config.save_pretrained(folder)


def parts_in_files(network: Any, state: Mapping[str, torch.Tensor]) -> list[Part]:
    """Divide the tensors of a transformers model into the smallest groups that can be converted by themselves.

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
    return _smallest_parts(kept, _conversion(network))


def one_part_each(state: Mapping[str, torch.Tensor]) -> list[Part]:
    """Return the parts of tensors that are stored as they are."""
    return [Part([name], {name: tensor}, _as_they_are) for name, tensor in state.items()]


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


def _conversion(network: Any) -> Convert:
    """Return the conversion from a model's tensors to a file's. Before transformers 5 they are the same."""
    try:
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return _as_they_are
    if CONVERSIONS in vars(network):
        network = copy.copy(network)
        vars(network)[CONVERSIONS] = plain_conversions(network)
    return cast(Convert, partial(loading.revert_weight_conversion, network))


def _smallest_parts(state: Tensors, convert: Convert) -> list[Part]:
    """Divide tensors into groups; converting each by itself must give the same as converting all at once."""
    together = convert(dict(state))
    parts, joint = [], {}
    for name, tensor in state.items():
        stored = _converted({name: tensor}, convert)
        if stored is not None and _is_part(stored, together):
            parts.append(Part([name], stored, convert))
        else:
            joint[name] = tensor
    for names in _by_layer(joint).values():
        stored = _converted({name: state[name] for name in names}, convert)
        parts.append(Part(names, stored or {}, convert))
    found = [name for part in parts for name in part.stored]
    if sorted(found) == sorted(together) and all(_is_part(part.stored, together) for part in parts):
        return parts
    return [Part(list(state), together, convert)]


def _converted(tensors: Tensors, convert: Convert) -> Tensors | None:
    try:
        return convert(tensors)
    except Exception:  # a conversion may raise anything if a part that it needs is missing
        return None


def _is_part(stored: Tensors, together: Tensors) -> bool:
    return all(
        name in together and together[name].shape == tensor.shape and together[name].dtype == tensor.dtype
        for name, tensor in stored.items()
    )


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by the innermost numbered module that they are in."""
    groups: dict[str, list[str]] = {}
    for name in names:
        numbered = [module for module in parent_names(name) if module.rpartition(".")[2].isdigit()]
        groups.setdefault(numbered[-1] if numbered else "", []).append(name)
    return groups
