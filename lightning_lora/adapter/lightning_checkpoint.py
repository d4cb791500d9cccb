"""What goes into a Lightning checkpoint, for the kinds adapter, merged and full.

    adapter  state_dict holds what training changes, and no base tensor
    merged   state_dict holds plain merged weights; checkpoint["lora"]["adapter"] what training changes
    full     state_dict holds base and adapter

checkpoint["lora"] describes the adapter in each kind. Lightning calls the module's on_save_checkpoint last, also with
save_weights_only=True; a callback's comes too early or not at all. So the instance's method is patched.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Set
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..distributed.sharding import gather_all, has_sharded
from ..errors import LoRAError
from ..model.injection import require_injection
from ..model.named_state import named_state
from ..model.state_dict import adapter_keys, adapter_state_dict, base_keys, merge_state_dict
from ..names import META, canonical
from .adapter import Adapter
from .apply import add_frozen_weights, align_names, check_adapter, record_trained
from .metadata import from_metadata, model_to_metadata

FORMAT_VERSION = 1

Kind = Literal["adapter", "merged", "full"]


def check_kind(kind: object) -> None:
    """Raise where `kind` is no kind of checkpoint."""
    if kind not in get_args(Kind):
        raise LoRAError(f"save must be one of {', '.join(get_args(Kind))}, but it is {kind!r}.")


def write(module: nn.Module, checkpoint: MutableMapping[str, Any], kind: Kind) -> None:
    """Turn a checkpoint with a complete state_dict into one of the given kind.

    Of a sharded model, the strategy has chosen and gathered what the state_dict holds, see strategy.py. Collective.
    """
    injected = require_injection(module, "checkpoint")
    record = injected.record
    state = checkpoint["state_dict"] = {canonical(name): value for name, value in checkpoint["state_dict"].items()}
    keys = adapter_keys(module)
    trained = set(keys)
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **model_to_metadata(module, trained=trained if kind == "full" else ()),
    }
    if kind == "full":
        meta["initial"] = gather_all(injected.seen(record.initial))
    else:
        shapes = {name: tensor.shape for name, tensor, _ in named_state(module) if tensor is not None}
        drop = {name: shapes[name] for name in base_keys(module) if name not in trained and name in shapes}
        for key in list(checkpoint):
            checkpoint[key] = _without(checkpoint[key], drop)
    if kind == "merged":
        sharded = has_sharded(module)
        adapter = gather_all(adapter_state_dict(module)) if sharded else {name: state[name] for name in keys}
        meta["adapter"] = in_one_storage(adapter)
        checkpoint["state_dict"] = state if sharded else merge_state_dict(module, state)
    elif kind == "adapter" and not has_sharded(module):
        checkpoint["state_dict"] = in_one_storage(checkpoint["state_dict"])
    checkpoint[META] = meta


def _without(value: Any, drop: Mapping[str, torch.Size]) -> Any:
    """A nested mapping without the tensors of those names and shapes, at any depth (weight averaging adds copies)."""
    if not isinstance(value, Mapping):
        return value
    kept = {
        name: _without(item, drop)
        for name, item in value.items()
        if not (isinstance(item, torch.Tensor) and drop.get(canonical(str(name))) == item.shape)
    }
    same = len(kept) == len(value) and all(kept[name] is value[name] for name in kept)
    return value if same else kept


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
        initial_values = _initial_values(module, checkpoint[META])
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
    for key, value in checkpoint.items():
        if key != META:
            checkpoint[key] = _completed(value, given, live)
    if kind == "merged" or given != adapter.tensors.keys():
        checkpoint["state_dict"] = {**live, **adapter.tensors}


def _initial_values(module: nn.Module, meta: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What training changed, as it was before, by the module's names.

    Files of 0.1.0 have the names of the part of a LightningModule that was injected: there is one prefix for these.
    """
    initial = meta.get("initial")
    shapes = {name: tensor.shape for name, tensor, _ in named_state(module) if tensor is not None}
    if isinstance(initial, Mapping) and all(isinstance(value, torch.Tensor) for value in initial.values()):
        first = next(iter(initial), "")
        prefixes = dict.fromkeys(["", *(name.removesuffix(first) for name in shapes if name.endswith(f".{first}"))])
        for prefix in prefixes:
            if all(shapes.get(prefix + name) == value.shape for name, value in initial.items()):
                return {prefix + name: value for name, value in initial.items()}
    raise LoRAError(
        'checkpoint["lora"]: expected `initial` to hold, by name, the values from before training of what was trained '
        f"beside the adapter, found {_shown(initial)}; the file is damaged or belongs to another model."
    )


def _shown(initial: object) -> str:
    return f"names {sorted(map(str, initial))[:3]}" if isinstance(initial, Mapping) else type(initial).__name__


def _completed(value: Any, adapter: Set[str], live: Mapping[str, Any]) -> Any:
    """A nested mapping in which every state dict of the adapter has the live base too: the inverse of _without."""
    if not isinstance(value, Mapping):
        return value
    given = {canonical(str(name)): item for name, item in value.items()}
    if adapter <= given.keys():
        return {**live, **given}
    completed = {name: _completed(item, adapter, live) for name, item in value.items()}
    return completed if any(completed[name] is not value[name] for name in completed) else value


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
