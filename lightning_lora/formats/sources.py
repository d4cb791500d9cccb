"""Adapters out of files and dictionaries, in any form that load_adapter takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..adapter.adapter import Adapter
from ..adapter.checks import check_factors, require_values
from ..adapter.own_options import with_options
from ..errors import LoRAError
from ..files.paths import PathLike, reading
from ..files.torch_archive import read_torch_file
from ..names import META, listed, names_factor
from ..nn.attached_factors import LACKING
from ..nn.foreign_entries import metadata_of, with_metadata
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT
from .forms import form_of
from .hub import local_source
from .lightning_checkpoint import adapter_in_checkpoint
from .peft_names import are_peft_names
from .peft_parameters import Order, check_order, usual_order
from .peft_reading import Source, read_folder, read_peft, read_tensor_file


def read_source(
    source: PathLike | Mapping[str, Any] | Adapter, order: Order = usual_order, verb: str = "load_adapter"
) -> Adapter:
    """Read an adapter in any of the forms that load_adapter takes.

    Args:
        source: the adapter; a text may be the id of a repository on the hub, see hub.py.
        order: the order in which the model registers the parameters of a module; PEFT's names depend on it.
        verb: what messages begin with.

    Raises:
        LoRAError: the source is damaged or of no such form, or the model has another order.
    """
    adapter = _read(source, order, verb)
    if adapter.peft_version is not None:
        check_order(adapter.parameters, order)
    return adapter


def _read(source: PathLike | Mapping[str, Any] | Adapter, order: Order, verb: str) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = local_source(source)
        form = form_of(source)
        if form in ("PEFT folder", "folder"):
            return read_folder(source, order)
        if form == "safetensors file":
            return read_tensor_file(source)
        adapter = _read_state(read_torch_file(source, plain=[META]), verb)
        require_values(adapter, str(source))
        return adapter
    if not isinstance(source, Mapping):
        raise LoRAError(
            f"{verb}: expected a path, a state dict or an adapter, found {type(source).__name__}. Of a model, call "
            "take_adapter first, and pass what it returns."
        )
    return _read_state(source, verb)


def holds_adapter_state(content: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint or state dict holds an adapter that read_source reads, by its names alone."""
    state = content.get("state_dict", content)
    within = [state, *state.values()] if isinstance(state, Mapping) else []
    return META in content or any(_name_adapter(_named_tensors(each)) for each in within if isinstance(each, Mapping))


def _read_state(source: Mapping[str, Any], verb: str) -> Adapter:
    """Return the adapter in a checkpoint or a state dict."""
    if META in source:
        return adapter_in_checkpoint(source)[0]
    tensors = _tensors_in(source.get("state_dict", source), verb)
    if are_peft_names(tensors):
        return read_peft(tensors, Source("adapter"))
    adapter = Adapter(tensors, lacking=_lacking_in(tensors))
    check_factors(adapter, "adapter")
    return adapter.with_kinds(_kinds_of_attention(adapter))


def _kinds_of_attention(adapter: Adapter) -> dict[str, str]:
    """Return the kinds of attention and its out_proj. Nothing else is an adapted layer in an adapted layer."""
    outputs = {name: adapter.options_name(name) for name in adapter.module_layers}
    pairs = [(output, attention) for output, attention in outputs.items() if output != attention]
    return {name: kind for pair in pairs for name, kind in zip(pair, (ATTENTION_OUTPUT, ATTENTION), strict=True)}


def _tensors_in(state: Any, verb: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict. Of several, as Fabric saves them, choose the one with an adapter.

    Raises:
        LoRAError: several entries hold an adapter, or none does.
    """
    if not isinstance(state, Mapping):
        raise LoRAError(f"{verb}: expected a state dict, found {type(state).__name__}.")
    tensors = _named_tensors(state)
    if _name_adapter(tensors):
        return tensors
    below = {key: _named_tensors(value) for key, value in state.items() if isinstance(value, Mapping)}
    found = {key: inside for key, inside in below.items() if _name_adapter(inside)}
    if len(found) > 1:
        first, second, *_ = found
        raise LoRAError(
            f"{verb}: {first!r} and {second!r} hold an adapter each; pass the one that you want, as "
            f"load_adapter(model, checkpoint[{first!r}])."
        )
    if not found and not tensors and state:
        raise LoRAError(
            f"{verb}: the source holds no lora_A, neither by itself nor in an entry; it holds "
            f"{listed(list(map(repr, state)))}."
        )
    return next(iter(found.values()), tensors)


def _named_tensors(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, with its metadata."""
    tensors = {name: v for name, v in state.items() if isinstance(name, str) and isinstance(v, torch.Tensor)}
    return with_metadata(tensors, metadata_of(state))


def _lacking_in(state: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of attached adapters that a state dict, by its metadata, does not hold."""
    with reading("adapter", "the metadata of a state dict"):
        return frozenset(str(name) for entry in metadata_of(state).values() for name in entry.get(LACKING, ()))


def _name_adapter(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(map(names_factor, tensors)) or are_peft_names(tensors)


def adapter_with_options(
    source: PathLike | Mapping[str, Any] | Adapter,
    lora_alpha: float | None = None,
    where: str = "",
    verb: str = "load_adapter",
) -> Adapter:
    """Read an adapter with its options, to apply it to files or to combine it without a model.

    Args:
        source: any form of adapter.
        lora_alpha: for a source that does not store it, such as a file of loralib's.
        where: the name of the source in messages; its path by default.
        verb: what messages begin with that find no adapter in the source.

    Raises:
        LoRAError: lora_alpha is missing, or both stored and given.
    """
    return with_options(read_source(source, verb=verb), where or source, lora_alpha)
