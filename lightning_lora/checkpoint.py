"""How a Lightning checkpoint of any kind (see saving.py) comes back.

Lightning calls the module's on_load_checkpoint before the strict load, and a callback's after it. So the instance's
method is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Set
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from .adapter import Adapter
from .description import described
from .errors import LoRAError
from .fit import check_fit, note_trained, placed_on, with_frozen
from .injection import call_previous, find_injection, named_state, patch, require_injection
from .saving import FORMAT_VERSION, META, Kind, write_as
from .wrappers import canonical

# Where WeightAveraging keeps the weights beside the averaged ones. Having an average, it goes back to them, even for a
# test of the best checkpoint, whose metric is that of the averaged weights.
CURRENT = "current_model_state"


def save_as(module: nn.Module, kind: Kind) -> None:
    """From now on, checkpoints of this LightningModule are of that kind, and those of every kind load."""
    write_as(module, kind)
    patch(module, "on_load_checkpoint", _on_load_checkpoint)


def read(module: nn.Module, checkpoint: MutableMapping[str, Any]) -> None:
    """Complete the state dicts of a checkpoint of any kind, so that Lightning's strict load takes them.

    Raises:
        LoRAError: the checkpoint does not fit the injected module. Nothing is loaded.
    """
    if META not in checkpoint:
        return  # a base checkpoint, or a full state dict; torch's strict load judges it
    adapter, kind = adapter_of(checkpoint)
    if kind == "full":  # its base comes along
        check_fit(module, replace(with_frozen(module, adapter), fingerprint={}))
        _check_full(module, checkpoint["state_dict"])
        note_trained(module, adapter)
        prefix, _, injection = require_injection(module, "checkpoint")
        path = f"{prefix}." if prefix else ""
        frozen = {name: checkpoint["state_dict"][path + name] for name in injection.unfrozen}
        injection.initial, injection.fingerprint = frozen | dict(checkpoint[META]["initial"]), {}
        return
    given = adapter.tensors.keys()
    adapter = placed_on(module, adapter)  # an imported adapter has the network's names
    whole = with_frozen(module, adapter)
    check_fit(module, whole)
    note_trained(module, adapter)
    live = {canonical(name): value for name, value in module.state_dict().items()} | dict(whole.tensors)
    for key, value in checkpoint.items():
        if key != META:
            checkpoint[key] = _completed(value, given, live)
    if kind == "merged" or given != adapter.tensors.keys():
        checkpoint["state_dict"] = {**live, **adapter.tensors}


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
    return described(tensors, meta, 'checkpoint["lora"]', with_base=kind == "full"), kind


def _check_full(module: nn.Module, state: Mapping[str, Any]) -> None:
    missing = [name for name, _, _ in named_state(module) if name not in state]
    if missing:
        raise LoRAError(
            f"the full checkpoint lacks {len(missing)} of the model's tensors, first {missing[0]!r}; it was cut or "
            "saved from another model."
        )


def _on_load_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    if find_injection(module) is not None:
        read(module, checkpoint)
        if META in checkpoint and CURRENT in checkpoint and not _is_fitting(module):
            checkpoint[CURRENT] = checkpoint["state_dict"]
    call_previous(module, previous, "on_load_checkpoint", checkpoint)


def _is_fitting(module: nn.Module) -> bool:
    trainer = getattr(module, "_trainer", None)
    return trainer is None or trainer.state.fn == "fit"
