"""Adapt the layers that LightningModule.setup and configure_model build. The options are checked after that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..model.adapted_model import AdaptedModel, Listing, find_model
from ..model.initial_values import snapshot_initial
from ..model.inject import adapt_new_layers, begin_injection, finish_injection, strip_adapters
from ..model.injection import Injection
from ..model.patches import call_previous, is_patched, patch, unpatch_method
from ..model.quantise import quantise_
from ..model.recorded_layers import describe_class
from ..nn.adapted_weights import adapted_layers
from .checkpoint_hooks import save_as
from .compatibility import refuse_other_options
from .deepspeed import outside_zero_init
from .lightning_packages import is_overridden
from .precision import convert_linear_layers_, leave_out_of_ddp_, naming_uneven_shards


def adapt_late_layers(handle: AdaptedModel) -> None:
    """Patch the methods of an injected LightningModule that may build layers; without any, judge its options now.

    The patches stay for the whole setup, because WeightAveraging calls configure_model before Lightning does.
    """
    names = [name for name in BUILDERS if is_overridden(name, handle.model)]
    for name in names:
        patch(handle.model, name, BUILDERS[name])
    if not names:
        finish_injection(handle)


def stop_adapting(module: nn.Module) -> None:
    """Take the patches of adapt_late_layers out."""
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
    """Call the method of this name by `build`, and adapt what it built; `complete`: all layers are there now."""
    earlier = find_model(module)
    if earlier is None:  # it was taken out meanwhile
        build()
        return
    record, layers = earlier.record, earlier.record.layers
    with _allowing_injection(earlier), naming_uneven_shards(earlier):
        build()
    with outside_zero_init():
        _adapt_built(module, record, layers, name, complete)


def _adapt_built(module: nn.Module, record: Injection, layers: Collection[str], name: str, complete: bool) -> None:
    """Adapt what was built. Arguments are those of _build_and_adapt, and what was adapted before."""
    handle = find_model(module)
    if handle is None:
        return
    goes_on = handle.record is record and record.layers is layers  # else what was built is recorded already
    convert_linear_layers_(handle)
    if handle.record.quantize is not None:
        quantise_(handle, handle.record.quantize, handle.record.config)
    adapt_new_layers(handle)
    leave_out_of_ddp_(handle)
    if goes_on:
        _warn_of_replaced(handle, layers, name)
    if complete:
        snapshot_initial(handle)
        finish_injection(handle)


def _warn_of_replaced(handle: AdaptedModel, layers: Collection[str], method: str) -> None:
    """Warn where the user's method replaced adapted layers by others that have parameters and are not adapted."""
    modules = dict(handle.root_modules)
    gone = [name for name in layers if name not in handle.record.layers and name in modules]
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
def _allowing_injection(earlier: AdaptedModel) -> Iterator[None]:
    """Let the user's method call inject() itself, on the module or a part of it; that injection then stands.

    A method that builds and shards has to call it: adapters come before fully_shard.
    """
    record = earlier.record
    still_empty = not record.validated and not earlier.layers
    if still_empty:
        strip_adapters(earlier)
    yield
    handle = find_model(earlier.model)
    if handle is None and still_empty:
        with outside_zero_init():
            handle = begin_injection(Listing(earlier.model), record.config, seed=record.seed, given=record.given)
    elif handle is not None and handle.record is not record:
        refuse_other_options(handle.record, record.config, record.given)
    if handle is not None:
        save_as(handle, record.save, record.dequantize)
