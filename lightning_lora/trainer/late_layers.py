"""Layers that LightningModule.setup and configure_model build: adapted right after, and only then judged."""

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
    """Adapt what these methods of an injected LightningModule build; with none of them, judge the options now."""
    for name in names:
        patch(module, name, _setup_and_adapt if name == "setup" else _configure_and_adapt)
    if not names:
        finish_injection(module)


def _setup_and_adapt(module: nn.Module, previous: Callable[[str], Any] | None, stage: str) -> None:
    """The patched setup: adapts what it built; judges the options where no configure_model follows."""
    _restore(module, "setup", previous)
    with _giving_way(module):
        call_previous(module, previous, "setup", stage)
    adapt_new_layers(module)
    if "configure_model" not in vars(module):
        snapshot_initial(module)
        finish_injection(module)


def _configure_and_adapt(module: nn.Module, previous: Callable[[], Any] | None) -> None:
    """The patched configure_model: adapts what it built, then judges the options."""
    _restore(module, "configure_model", previous)
    with _giving_way(module):
        call_previous(module, previous, "configure_model")
    if find_injection(module) is None:
        return  # taken out meanwhile
    adapt_new_layers(module)
    snapshot_initial(module)
    finish_injection(module)


@contextmanager
def _giving_way(module: nn.Module) -> Iterator[None]:
    """Who builds and shards calls inject() in between, on the module or a part of it; that injection then stands."""
    ours = require_injection(module, "LoRACallback").record
    waiting = not ours.validated and not adapted_layers(module)
    if waiting:
        strip_adapters(module)
    yield
    theirs = find_injection(module)
    if theirs is None and waiting:
        begin_injection(module, ours.config, seed=ours.seed)
    elif theirs is not None and theirs.record is not ours:
        refuse_other_options(theirs.record, ours.config)
    if find_injection(module) is not None:
        save_as(module, ours.save)


def _restore(module: nn.Module, name: str, previous: Callable[..., Any] | None) -> None:
    delattr(module, name)
    if previous is not None:
        setattr(module, name, previous)
