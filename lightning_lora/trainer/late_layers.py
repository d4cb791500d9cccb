"""Adapt the layers that LightningModule.setup and configure_model build. The options are checked after that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..model.inject import adapt_new_layers, begin_injection, finish_injection, strip_adapters
from ..model.injection import (
    Injected,
    describe_class,
    find_injection,
    forget_rebuilt,
    require_injection,
    snapshot_initial,
)
from ..model.patches import call_previous, is_patched, patch, unpatch_method
from ..names import canonical
from ..nn.lora_layer import adapted_layers
from .checkpoint_hooks import save_as
from .compatibility import refuse_other_options
from .precision import convert_linear_layers_, leave_out_of_ddp_


def adapt_after(module: nn.Module, *names: str) -> None:
    """Patch methods of an injected LightningModule so that the layers that they build are adapted.

    The patches stay for the whole setup, because WeightAveraging calls configure_model before Lightning does.

    Args:
        module: the LightningModule.
        names: the methods in BUILDERS that the module overrides. Without any, the options are checked now.
    """
    for name in names:
        patch(module, name, BUILDERS[name])
    if not names:
        finish_injection(module)


def stop_adapting(module: nn.Module) -> None:
    """Remove the patches of adapt_after."""
    for name, function in BUILDERS.items():
        unpatch_method(module, name, function)


def _setup_and_adapt(module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> None:
    """Adapt what setup built. Where the module has a configure_model, the options are checked after that."""
    complete = not is_patched(module, "configure_model", _configure_and_adapt)
    _build_and_adapt(module, partial(call_previous, module, previous, "setup", *args, **kwargs), "setup", complete)


def _configure_and_adapt(module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> None:
    build = partial(call_previous, module, previous, "configure_model", *args, **kwargs)
    _build_and_adapt(module, build, "configure_model", complete=True)


BUILDERS: dict[str, Callable[..., None]] = {"setup": _setup_and_adapt, "configure_model": _configure_and_adapt}


def _build_and_adapt(module: nn.Module, build: Callable[[], Any], name: str, complete: bool) -> None:
    """Build layers and adapt them.

    Args:
        module: the LightningModule.
        build: calls the user's method.
        name: of the method, for messages.
        complete: no other method builds layers after this one.
    """
    injected = find_injection(module)
    if injected is None:  # unloaded since the method was patched
        build()
        return
    record, layers, modules = injected.record, injected.record.layers, set(injected.root.modules())
    with _allowing_injection(module):
        build()
    injected = find_injection(module)
    if injected is None:
        return
    goes_on = injected.record is record and record.layers is layers  # else what was built is recorded already
    if goes_on:
        forget_rebuilt(module, modules)
    convert_linear_layers_(module)
    adapt_new_layers(module)
    leave_out_of_ddp_(module)
    if goes_on:
        _warn_of_replaced(injected, layers, name)
    if complete:
        snapshot_initial(module)
        finish_injection(module)


def _warn_of_replaced(injected: Injected, layers: Iterable[str], method: str) -> None:
    """Warn where the user's method replaced adapted layers by others that have parameters and are not adapted."""
    modules = {canonical(name): module for name, module in injected.root.named_modules()}
    gone = [name for name in layers if name not in injected.record.layers and name in modules]
    replaced = [name for name in gone if list(modules[name].parameters()) and not adapted_layers(modules[name])]
    if replaced:
        shown = ", ".join(f"{name!r} (now a {describe_class(modules[name])})" for name in replaced[:3])
        warnings.warn(
            f"lightning_lora: {method} replaced adapted layers by others, which are not adapted: {shown}"
            f"{', ...' if len(replaced) > 3 else ''}; leave them out with exclude_modules={replaced[:3]}, or name what "
            "is to be adapted in target_modules.",
            stacklevel=2,
        )


@contextmanager
def _allowing_injection(module: nn.Module) -> Iterator[None]:
    """Let the user's method call inject() itself, on the module or a part of it. That injection then counts.

    A method that builds and shards has to call it: adapters come before fully_shard.
    """
    record = require_injection(module, "LoRACallback").record
    still_empty = not record.validated and not adapted_layers(module)
    if still_empty:
        strip_adapters(module)
    yield
    injected = find_injection(module)
    if injected is None and still_empty:
        begin_injection(module, record.config, seed=record.seed, given=record.given)
    elif injected is not None and injected.record is not record:
        refuse_other_options(injected.record, record.config, record.given)
    if find_injection(module) is not None:
        save_as(module, record.save, record.dequantize)
