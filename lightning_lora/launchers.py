"""What comes back from processes that a launcher starts: ddp_spawn, ddp_fork and ddp_notebook.

Lightning brings home the module's state dict alone, and loads it in the main process, where no hook of a callback runs.
So a started process adds to its last state dict what it has learned of the injection, and load_state_dict takes it up.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .injection import ATTRIBUTE, Injection, require_injection
from .loading import EXTRA_ENTRIES
from .saving import write_as

ENTRY = "lora_learned"
FIELDS = {"trained": set, "unfrozen": set, "initial": dict, "fingerprint": dict}


def send_home(module: nn.Module) -> None:
    """From now on, state dicts of this module carry what the main process needs; this process is about to end."""
    root = require_injection(module, "send_home")[1]
    root.register_state_dict_post_hook(_add)  # type: ignore[no-untyped-call]


def take_up(root: nn.Module, learned: dict[str, Any]) -> None:
    """What another process sent home; a LightningModule saves from now on as it did there."""
    for name, kind in FIELDS.items():
        setattr(vars(root)[ATTRIBUTE], name, kind(learned[name]))
    if learned["save"] is not None and hasattr(root, "on_save_checkpoint"):
        write_as(root, learned["save"])


def _add(root: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    injection: Injection = vars(root)[ATTRIBUTE]
    learned = {name: getattr(injection, name) for name in FIELDS}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in learned.items()}
    state[prefix + ENTRY] = {"save": injection.save, **plain}


EXTRA_ENTRIES[ENTRY] = take_up
