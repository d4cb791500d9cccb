"""What goes into a Lightning checkpoint, for the kinds adapter, merged and full.

    adapter  state_dict holds what training changes, and no base tensor
    merged   state_dict holds plain merged weights; checkpoint["lora"]["adapter"] what training changes
    full     state_dict holds base and adapter

checkpoint["lora"] describes the adapter in each kind. Lightning calls the module's on_save_checkpoint last, also with
save_weights_only=True; a callback's comes too early or not at all. So the instance's method is patched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Set
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..distributed.sharding import gather_all, has_sharded
from ..errors import LoRAError
from ..model.injection import require_injection
from ..model.named_state import named_state
from ..model.state_dict import adapter_keys, adapter_state_dict, merge_state_dict
from ..names import META, canonical
from ..nn.lora_layer import is_factor
from .adapter import Adapter
from .apply import add_frozen_weights, align_names, check_adapter, record_trained
from .fingerprint import AVERAGED, entries_match, fingerprint_entry
from .metadata import base_fingerprint, from_metadata, model_to_metadata

FORMAT_VERSION = 1

Kind = Literal["adapter", "merged", "full"]


def check_kind(kind: object) -> None:
    """Raise where `kind` is no kind of checkpoint."""
    if kind not in get_args(Kind):
        raise LoRAError(f"save must be one of {', '.join(get_args(Kind))}, but it is {kind!r}.")


def write(module: nn.Module, checkpoint: MutableMapping[str, Any], kind: Kind) -> None:
    """Turn a checkpoint with a complete state_dict into one of the given kind, in place.

    Of a sharded model, the strategy has chosen and gathered what the state_dict holds, see trainer/strategies.py.
    Collective.
    """
    injected = require_injection(module, "checkpoint")
    state = checkpoint["state_dict"] = {canonical(name): value for name, value in checkpoint["state_dict"].items()}
    keys = adapter_keys(module)
    trained = set(keys)
    meta = checkpoint_metadata(kind, model_to_metadata(module, trained=trained if kind == "full" else ()))
    if kind == "full":
        meta["initial"] = gather_all(injected.seen(injected.record.initial))
    else:
        frozen = {name for name, tensor, _ in named_state(module) if tensor is not None} - trained
        meta["copies"] = _strip_copies(module, checkpoint, frozen)
    if kind == "merged":
        sharded = has_sharded(module)
        adapter = gather_all(adapter_state_dict(module)) if sharded else {name: state[name] for name in keys}
        meta["adapter"] = in_one_storage(adapter)
        checkpoint["state_dict"] = state if sharded else merge_state_dict(module, state)
    elif kind == "adapter":
        adapter = {name: value for name, value in state.items() if name not in frozen}
        checkpoint["state_dict"] = adapter if has_sharded(module) else in_one_storage(adapter)
    checkpoint[META] = meta


def checkpoint_metadata(kind: Kind, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what checkpoint["lora"] holds in each kind: the version of the format, the kind, and the metadata."""
    return {"format_version": FORMAT_VERSION, "kind": kind, **metadata}


def _strip_copies(module: nn.Module, checkpoint: MutableMapping[str, Any], frozen: Set[str]) -> list[list[Any]]:
    """Take the frozen base out of copies of the module's state that others, as weight averaging, keep in a checkpoint.

    Returns:
        Where they are: the keys that lead to each. A user's own entry under parameters' names is no copy: it lacks a
        name, or has other values.
    """
    copies: list[list[Any]] = []
    every = {name for name, tensor, _ in named_state(module) if isinstance(tensor, nn.Parameter)}
    known = base_fingerprint(module)

    def strip(mapping: Mapping[Any, Any], path: tuple[Any, ...]) -> dict[Any, Any] | None:
        named = {canonical(str(name)): value for name, value in mapping.items()}
        if not every <= named.keys() or not all(
            _is_near(named[name], entry) for name, entry in known.items() if name in every
        ):
            return None
        copies.append(list(path))
        return {name: value for name, value in mapping.items() if canonical(str(name)) not in frozen}

    for key in checkpoint.keys() - {"state_dict"}:
        checkpoint[key] = _replace_mappings(checkpoint[key], strip, (key,))
    return copies


def _is_near(value: Any, entry: Mapping[str, Any]) -> bool:
    """Whether a tensor may be a frozen one, as it is or averaged."""
    return isinstance(value, torch.Tensor) and entries_match(entry, fingerprint_entry(value), AVERAGED)


def _replace_mappings(
    value: Any,
    replacement: Callable[[Mapping[Any, Any], tuple[Any, ...]], dict[Any, Any] | None],
    path: tuple[Any, ...],
) -> Any:
    """A nested mapping with others in place of some, at any depth; what is left alone keeps its identity."""
    if not isinstance(value, Mapping):
        return value
    replaced = replacement(value, path)
    if replaced is not None:
        return replaced
    items = {name: _replace_mappings(item, replacement, (*path, name)) for name, item in value.items()}
    return items if any(items[name] is not value[name] for name in items) else value


def read(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Complete the state dicts of a checkpoint of any kind, so that Lightning's strict load takes them.

    Raises:
        LoRAError: the checkpoint does not fit the injected module. Nothing is loaded.
    """
    if META not in checkpoint:
        return  # a base checkpoint, or a full state dict; torch's strict load judges it
    adapter, kind = adapter_of(checkpoint)
    if kind == "full":  # its base comes along
        check_adapter(module, replace(add_frozen_weights(module, adapter), fingerprint={}))
        _check_full(module, checkpoint["state_dict"])
        initial_values = _initial_values(module, checkpoint[META], adapter)
        record_trained(module, adapter)
        injected = require_injection(module, "checkpoint")
        record, state = injected.record, checkpoint["state_dict"]
        frozen = {name: state[injected.name_seen(name)] for name in record.unfrozen}
        initial = {name.removeprefix(injected.prefix): value for name, value in initial_values.items()}
        record.initial, record.fingerprint = frozen | initial, {}
        return
    given = adapter.tensors.keys()
    adapter = align_names(module, adapter)  # an imported adapter has the network's names
    complete = add_frozen_weights(module, adapter)
    check_adapter(module, complete)
    record_trained(module, adapter)
    live = {canonical(name): value for name, value in module.state_dict().items()} | dict(complete.tensors)
    copies = checkpoint[META].get("copies")

    def with_base(mapping: Mapping[Any, Any], path: tuple[Any, ...]) -> dict[Any, Any] | None:
        named = {canonical(str(name)): value for name, value in mapping.items()}
        # Files of 0.1.0 do not say where copies are.
        is_copy = given <= named.keys() if copies is None or path == ("state_dict",) else list(path) in copies
        return {**live, **named} if is_copy else None

    for key in checkpoint.keys() - {META}:
        checkpoint[key] = _replace_mappings(checkpoint[key], with_base, (key,))
    if kind == "merged" or given != adapter.tensors.keys():
        checkpoint["state_dict"] = {**live, **adapter.tensors}


def _initial_values(module: nn.Module, meta: Mapping[str, Any], adapter: Adapter) -> dict[str, torch.Tensor]:
    """What training changed, as it was before, by the module's names: no buffer and no trained parameter is missing.

    Files of 0.1.0 have the names of the part of a LightningModule that was injected: there is one prefix for these.
    """
    initial = meta.get("initial")
    live = {name: tensor for name, tensor, owner in named_state(module) if not is_factor(name, owner)}
    shapes = {name: tensor.shape for name, tensor in live.items() if tensor is not None}
    changed = {name: live[name] for name in adapter.tensors if name in shapes}
    if isinstance(initial, Mapping) and all(isinstance(value, torch.Tensor) for value in initial.values()):
        first = next(iter(initial), "")
        prefixes = dict.fromkeys(["", *(name.removesuffix(first) for name in shapes if name.endswith(f".{first}"))])
        for prefix in prefixes:
            known = {id(live[prefix + name]) for name in initial if prefix + name in shapes}
            part = prefix + _common_module(initial)  # what is trained beside it is not the injection's business
            wanted = {id(tensor) for name, tensor in changed.items() if name.startswith(part)}
            fits = all(shapes.get(prefix + name) == value.shape for name, value in initial.items())
            if fits and wanted <= known:
                return {prefix + name: value for name, value in initial.items()}
    raise LoRAError(
        'checkpoint["lora"]: expected `initial` to hold, by name, the values from before training of what was trained '
        f"beside the adapter, found {_shown(initial)}; the file is damaged or belongs to another model."
    )


def _common_module(names: Iterable[str]) -> str:
    """The module that holds all the named tensors, "" or ending in a dot."""
    segments = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = itertools.takewhile(lambda several: len(set(several)) == 1, segments)
    return "".join(f"{several[0]}." for several in common)


def _shown(initial: object) -> str:
    return f"names {sorted(map(str, initial))[:3]}" if isinstance(initial, Mapping) else type(initial).__name__


def adapter_of(checkpoint: Mapping[str, Any]) -> tuple[Adapter, Kind]:
    """The adapter in a checkpoint that this package wrote.

    Raises:
        LoRAError: checkpoint["lora"] is missing or not of a known form.
    """
    meta = checkpoint.get(META)
    if not isinstance(meta, Mapping) or meta.get("kind") not in get_args(Kind):
        raise LoRAError('checkpoint["lora"] is missing or damaged; this is not a checkpoint of lightning_lora.')
    if meta.get("format_version") != FORMAT_VERSION:
        raise LoRAError(
            f"the checkpoint has format {meta.get('format_version')!r}, this lightning_lora reads {FORMAT_VERSION}; "
            "install the version that wrote it."
        )
    kind: Kind = meta["kind"]
    tensors = meta.get("adapter") if kind == "merged" else checkpoint.get("state_dict")
    if not isinstance(tensors, Mapping):
        raise LoRAError('checkpoint["lora"] is damaged: the tensors are missing.')
    return from_metadata(tensors, meta, 'checkpoint["lora"]', with_base=kind == "full"), kind


def _check_full(module: nn.Module, state: Mapping[str, Any]) -> None:
    missing = [name for name, _, _ in named_state(module) if name not in state]
    if missing:
        raise LoRAError(
            f"the full checkpoint lacks {len(missing)} of the model's tensors, first {missing[0]!r}; it was cut or "
            "saved from another model."
        )


def in_one_storage(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, copied to the CPU, all tensors of one dtype in one storage; what is no plain tensor stays."""
    places = {name: _place(value) for name, value in values.items() if _is_plain(value)}
    copies: dict[Any, torch.Tensor] = {}
    for dtype in {values[name].dtype for name in places}:
        different = {place: values[name] for name, place in places.items() if values[name].dtype == dtype}
        flat = torch.empty(sum(tensor.numel() for tensor in different.values()), dtype=dtype)
        parts = torch.split(flat, [tensor.numel() for tensor in different.values()])
        for (place, tensor), part in zip(different.items(), parts, strict=True):
            copies[place] = part.view(tensor.shape).copy_(tensor.detach())
    return {name: copies[places[name]] if name in places else value for name, value in values.items()}


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_meta


def _place(tensor: torch.Tensor) -> Any:
    """The same for the names of a tied tensor, which is saved once."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
