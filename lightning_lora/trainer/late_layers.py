"""Layers that LightningModule.setup and configure_model build: adapted right after, before the options are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..model.inject import adapt_new_layers, begin_injection, finish_injection, strip_adapters
from ..model.injection import find_injection, require_injection, snapshot_initial
from ..model.patches import call_previous, patch
from ..nn.lora_layer import adapted_layers
from .checkpoint_hooks import save_as
from .compatibility import refuse_other_options

BUILDERS = ("setup", "configure_model")


def adapt_after(module: nn.Module, *names: str) -> None:
    """Patch methods of an injected LightningModule so that what they build is adapted; without any, judge options now.

    Args:
        module: the LightningModule.
        names: those of BUILDERS that it overrides.
    """
    for name in names:
        patch(module, name, _setup_and_adapt if name == "setup" else _configure_and_adapt)
    if not names:
        finish_injection(module)


def _setup_and_adapt(module: nn.Module, previous: Callable[[str], Any] | None, stage: str) -> None:
    _build(module, previous, "setup", stage)
    adapt_new_layers(module)
    if "configure_model" not in vars(module):  # else the options are judged after that
        snapshot_initial(module)
        finish_injection(module)


def _configure_and_adapt(module: nn.Module, previous: Callable[[], Any] | None) -> None:
    _build(module, previous, "configure_model")
    if find_injection(module) is not None:  # else it was taken out meanwhile
        adapt_new_layers(module)
        snapshot_initial(module)
        finish_injection(module)


def _build(module: nn.Module, previous: Callable[..., Any] | None, name: str, *args: Any) -> None:
    """Put the method itself back in place of the patch, and call it."""
    delattr(module, name)
    if previous is not None:
        setattr(module, name, previous)
    with _allowing_injection(module):
        call_previous(module, previous, name, *args)


@contextmanager
def _allowing_injection(module: nn.Module) -> Iterator[None]:
    """Let the user's method call inject() itself, on the module or a part of it; that injection then stands.

    A method that builds and shards has to: adapters come before fully_shard.
    """
    record = require_injection(module, "LoRACallback").record
    still_empty = not record.validated and not adapted_layers(module)
    if still_empty:
        strip_adapters(module)
    yield
    injected = find_injection(module)
    if injected is None and still_empty:
        begin_injection(module, record.config, seed=record.seed)
    elif injected is not None and injected.record is not record:
        refuse_other_options(injected.record, record.config)
    if find_injection(module) is not None:
        save_as(module, record.save)
