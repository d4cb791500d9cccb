"""A Trainer's checkpoints: the LightningModule's own hooks are patched.

Lightning calls the module's on_save_checkpoint last, also with save_weights_only=True, and its on_load_checkpoint
before the strict load; a callback's hooks come too early, too late or not at all. From the processes of ddp_spawn,
ddp_fork and ddp_notebook it brings home a state dict alone: what they learned of the injection goes into it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import nn

from ..adapter.lightning_checkpoint import Kind, check_kind, read, write
from ..model.injection import Injection, find_injection, require_injection
from ..model.patches import call_previous, patch
from ..model.state_dict import EXTRA_ENTRIES
from ..names import ATTRIBUTE, ENTRY, META


def write_as(module: nn.Module, kind: Kind) -> None:
    """From now on, checkpoints of this LightningModule are of that kind."""
    check_kind(kind)
    require_injection(module, "save_as").record.save = kind
    patch(module, "on_save_checkpoint", _on_save_checkpoint)


def _on_save_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    call_previous(module, previous, "on_save_checkpoint", checkpoint)
    found = find_injection(module)
    if found is not None and found.record.save is not None:
        write(module, checkpoint, found.record.save)


# Where WeightAveraging keeps the weights beside the averaged ones. Having an average, it goes back to them, even for a
# test of the best checkpoint, whose metric is that of the averaged weights.
CURRENT = "current_model_state"


def save_as(module: nn.Module, kind: Kind) -> None:
    """From now on, checkpoints of this LightningModule are of that kind, and those of every kind load."""
    write_as(module, kind)
    patch(module, "on_load_checkpoint", _on_load_checkpoint)


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


EXPORTED = {"trained": set, "unfrozen": set, "initial": dict, "fingerprint": dict}


def export_state(module: nn.Module) -> None:
    """From now on, state dicts of this module carry what the main process needs; this process is about to end."""
    root = require_injection(module, "export_state").root
    root.register_state_dict_post_hook(_export_to_state_dict)  # type: ignore[no-untyped-call]


def import_state(root: nn.Module, learned: dict[str, Any]) -> None:
    """What another process sent home; a LightningModule saves from now on as it did there."""
    for name, kind in EXPORTED.items():
        setattr(vars(root)[ATTRIBUTE], name, kind(learned[name]))
    if learned["save"] is not None and hasattr(root, "on_save_checkpoint"):
        write_as(root, learned["save"])


def _export_to_state_dict(root: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    injection: Injection = vars(root)[ATTRIBUTE]
    learned = {name: getattr(injection, name) for name in EXPORTED}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in learned.items()}
    state[prefix + ENTRY] = {"save": injection.save, **plain}


EXTRA_ENTRIES[ENTRY] = import_state
