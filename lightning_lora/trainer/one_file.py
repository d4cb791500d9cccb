"""Checkpoints under strategies that divide a model or its optimizer: the one file that a single device writes.

What is trained is small. So it is gathered, the first rank writes it, every rank reads it, and each takes its part. The
strategy and the number of ranks may be others then. The states of optimizers are by the position of their parameters,
as torch's Optimizer.state_dict has them on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ..distributed.deepspeed_optimizer import groups_of, holds_copies, load_state_, whole_state
from ..distributed.sharding import gather_all, is_sharded, shard_like
from ..errors import LoRAError
from ..exchange.checkpoint_of_model import gathered_state, write_whole_state_
from ..model.adapted_model import Listing, find_adapted
from ..model.initial_values import snapshot_materialised
from ..model.live_state import original_values
from ..model.patches import call_previous, patch
from ..names import LIGHTNING, MERGED_FOR_GOOD, derives_from
from .deepspeed import with_float32_values
from .run_state import run_of


def share_one_file(strategy: Any) -> None:
    """Patch how a strategy saves and loads checkpoints. In place; harmless when repeated."""
    patch(strategy, "lightning_module_state_dict", _state_dict)
    patch(strategy, "optimizer_state", _optimizer_state)
    patch(strategy, "save_checkpoint", _save_checkpoint)
    patch(strategy, "load_checkpoint", _load_checkpoint)
    patch(strategy, "load_model_state_dict", _load_model_state_dict)


# --- saving ---


def _state_dict(strategy: Any, previous: Callable[..., Any] | None) -> Any:
    """Gather what the module's kind of checkpoint holds: the patched lightning_module_state_dict. Collective."""
    module = strategy.lightning_module
    handle = find_adapted(module)
    if handle is not None:
        run = run_of(handle.injection)
        return gathered_state(handle, run.save, run.dequantize, keep=strategy.is_global_zero)
    if MERGED_FOR_GOOD in vars(module):
        return gather_all(original_values(Listing(module).state()))
    return call_previous(strategy, previous, "lightning_module_state_dict")


def _optimizer_state(strategy: Any, previous: Callable[..., Any] | None, optimizer: Any) -> Any:
    """Return the state dict that the optimizer would have on one device: the patched optimizer_state. Collective."""
    if not _is_ours(strategy):
        return call_previous(strategy, previous, "optimizer_state", optimizer)
    if derives_from(optimizer, "LightningOptimizer", LIGHTNING):
        optimizer = optimizer.optimizer
    if holds_copies(optimizer):
        return whole_state(optimizer)
    packed = optimizer.state_dict()
    return {**packed, "state": {n: gather_all(state) for n, state in packed["state"].items()}}


def _is_ours(strategy: Any) -> bool:
    """Return whether the module has adapters, or had some until a fit merged them for good."""
    module = strategy.lightning_module
    return find_adapted(module) is not None or MERGED_FOR_GOOD in vars(module)


def _save_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint: Any, filepath: Any, storage_options: Any = None
) -> None:
    """Write an ordinary file on the first rank: the patched save_checkpoint. Collective.

    Raises:
        LoRAError: the first rank could not write. It raises its own error.
    """
    if not _is_ours(strategy):
        call_previous(strategy, previous, "save_checkpoint", checkpoint, filepath, storage_options=storage_options)
        return
    content, failure = with_float32_values(strategy.lightning_module, checkpoint, strategy.optimizers), None
    if strategy.is_global_zero:
        try:
            strategy.checkpoint_io.save_checkpoint(content, filepath, storage_options=storage_options)
        except Exception as error:
            failure = error
    said = strategy.broadcast(f"{type(failure).__name__}: {failure}" if failure else "")
    if failure is not None:
        raise failure
    if said:
        raise LoRAError(f"LoRACallback: the first rank could not write {filepath}: {said}.")


# --- loading ---


def _load_checkpoint(strategy: Any, previous: Callable[..., Any] | None, path: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a file on every rank; load_model_state_dict takes it from there: the patched load_checkpoint."""
    handle = find_adapted(strategy.lightning_module)
    if handle is None:
        return call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    snapshot_materialised(handle)
    return strategy.checkpoint_io.load_checkpoint(strategy.broadcast(path), *args, **kwargs)


def _load_model_state_dict(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint: Mapping[str, Any], strict: bool = True
) -> None:
    """Load this rank's part of the model, and in a fit of the optimizers: the patched load_model_state_dict.

    Lightning calls no method for the optimizers of these strategies (lightning_restore_optimizer is False).

    Raises:
        LoRAError: a fit would go on from other optimizers, or from none; or the state dict does not fit the model.
    """
    handle = find_adapted(strategy.lightning_module)
    if handle is None:
        call_previous(strategy, previous, "load_model_state_dict", checkpoint, strict=strict)
        return
    optimizers = strategy.optimizers if strategy.lightning_module.trainer.state.fn == "fit" else []
    states = checkpoint.get("optimizer_states")
    if optimizers:
        _refuse_other_optimizers(optimizers, states)
    write_whole_state_(handle, checkpoint, strict=strict)
    for optimizer, state in zip(optimizers, states or (), strict=False):
        _load_optimizer_(optimizer, state)


def _refuse_other_optimizers(optimizers: Sequence[Any], states: Sequence[Mapping[str, Any]] | None) -> None:
    """Raise LoRAError where a fit with optimizers would go on from a checkpoint of others, or without their states."""
    if not states:
        raise LoRAError(
            "LoRACallback: the checkpoint at ckpt_path holds weights only, without the optimizer's state that a fit "
            "goes on with. To start a new fit from them, in Python call load_adapter(model, path) and leave ckpt_path "
            "out."
        )
    saved = [[len(group["params"]) for group in state["param_groups"]] for state in states]
    built = [[len(group["params"]) for group in groups_of(optimizer)] for optimizer in optimizers]
    if saved != built:
        raise LoRAError(
            f"LoRACallback: the optimizers in the checkpoint have groups of {saved} parameters, and "
            f"configure_optimizers built groups of {built}. Build the same; or, to start a new fit, in Python call "
            "load_adapter(model, path) and leave ckpt_path out."
        )


def _load_optimizer_(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Load a state dict as one device has it. In place."""
    held, built = ([group["params"] for group in groups] for groups in (saved["param_groups"], groups_of(optimizer)))
    of = dict(zip(chain(*held), chain(*built), strict=True))
    if holds_copies(optimizer):
        load_state_(optimizer, saved, {id(of[n]): state for n, state in saved["state"].items()})
        return
    state = {n: {k: _part(v, of[n]) for k, v in state.items()} for n, state in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


def _part(value: Any, parameter: torch.Tensor) -> Any:
    """Return a state of a parameter, divided as the parameter is."""
    if is_sharded(parameter) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return shard_like(value, parameter)
    return value
