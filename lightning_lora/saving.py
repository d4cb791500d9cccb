"""What goes into a Lightning checkpoint, for the kinds adapter, merged and full.

    adapter  state_dict holds what training changes, and no base tensor
    merged   state_dict holds plain merged weights; checkpoint["lora"]["adapter"] what training changes
    full     state_dict holds base and adapter

checkpoint["lora"] describes the adapter in each kind. Lightning calls the module's on_save_checkpoint last, also with
save_weights_only=True; a callback's comes too early or not at all. So the instance's method is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from .description import describe
from .errors import LoRAError
from .injection import call_previous, find_injection, named_state, patch, require_injection
from .one_storage import in_one_storage
from .sharding import has_sharded, whole
from .state import adapter_keys, adapter_state_dict, base_keys, fold
from .wrappers import canonical

META = "lora"
FORMAT_VERSION = 1
Kind = Literal["adapter", "merged", "full"]


def check_kind(kind: object) -> None:
    """Raise where `kind` is no kind of checkpoint."""
    if kind not in get_args(Kind):
        raise LoRAError(f"save must be one of {', '.join(get_args(Kind))}, but it is {kind!r}.")


def write_as(module: nn.Module, kind: Kind) -> None:
    """From now on, checkpoints of this LightningModule are of that kind."""
    check_kind(kind)
    require_injection(module, "save_as")[2].save = kind
    patch(module, "on_save_checkpoint", _on_save_checkpoint)


def write(module: nn.Module, checkpoint: MutableMapping[str, Any], kind: Kind) -> None:
    """Turn a checkpoint with a complete state_dict into one of the given kind.

    Of a sharded model, the strategy has chosen and gathered what the state_dict holds, see strategy.py. Collective.
    """
    _, _, injection = require_injection(module, "checkpoint")
    state = checkpoint["state_dict"] = {canonical(name): value for name, value in checkpoint["state_dict"].items()}
    keys = adapter_keys(module)
    trained = set(keys)
    meta: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **describe(module, trained=trained if kind == "full" else ()),
    }
    if kind == "full":
        meta["initial"] = whole(injection.initial)
    else:
        shapes = {name: tensor.shape for name, tensor, _ in named_state(module) if tensor is not None}
        drop = {name: shapes[name] for name in base_keys(module) if name not in trained and name in shapes}
        for key in list(checkpoint):
            checkpoint[key] = _without(checkpoint[key], drop)
    if kind == "merged":
        sharded = has_sharded(module)
        adapter = whole(adapter_state_dict(module)) if sharded else {name: state[name] for name in keys}
        meta["adapter"] = in_one_storage(adapter)
        checkpoint["state_dict"] = state if sharded else fold(module, state)
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


def _on_save_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    call_previous(module, previous, "on_save_checkpoint", checkpoint)
    found = find_injection(module)
    if found is not None and found[2].save is not None:
        write(module, checkpoint, found[2].save)
