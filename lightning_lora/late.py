"""Layers that LightningModule.setup and configure_model build: adapted right after, and only then judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .inject import adapt_new_layers, finish_injection
from .injection import call_previous, find_injection, note_initial, patch

BUILDERS = ("setup", "configure_model")


def adapt_after(module: nn.Module, *names: str) -> None:
    """Adapt what these methods of an injected LightningModule build; with none of them, judge the options now."""
    for name in names:
        patch(module, name, _setup_and_adapt if name == "setup" else _configure_and_adapt)
    if not names:
        finish_injection(module)


def _setup_and_adapt(module: nn.Module, previous: Callable[[str], Any] | None, stage: str) -> None:
    """The patched setup: adapts what it built; judges the options where no configure_model follows."""
    _restore(module, "setup", previous)
    call_previous(module, previous, "setup", stage)
    adapt_new_layers(module)
    if "configure_model" not in vars(module):
        note_initial(module)
        finish_injection(module)


def _configure_and_adapt(module: nn.Module, previous: Callable[[], Any] | None) -> None:
    """The patched configure_model: adapts what it built, then judges the options."""
    _restore(module, "configure_model", previous)
    call_previous(module, previous, "configure_model")
    if find_injection(module) is None:
        return  # taken out meanwhile
    adapt_new_layers(module)
    note_initial(module)
    finish_injection(module)


def _restore(module: nn.Module, name: str, previous: Callable[..., Any] | None) -> None:
    delattr(module, name)
    if previous is not None:
        setattr(module, name, previous)
