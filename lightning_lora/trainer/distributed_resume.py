"""Resume and evaluate from a folder of another strategy, under a strategy that keeps the whole model on each device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoRAError
from ..formats.deepspeed_folder import file_beside_engine
from ..formats.distributed_folder import holds_shards_at, read_for_resume
from ..formats.forms import form_of
from ..model.adapted_model import AdaptedModel
from ..model.patches import call_previous, patch
from ..model.state_dict import adapter_keys, base_keys


def accept_folders(strategy: Any) -> None:
    """Let a strategy load distributed folders and DeepSpeed's as the files that Lightning expects. In place."""
    patch(strategy, "load_checkpoint", _load_checkpoint)


def _load_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint_path: Any, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(checkpoint_path, (str, os.PathLike)) and form_of(checkpoint_path) == "DeepSpeed folder":
        checkpoint_path = file_beside_engine(checkpoint_path)
    if not holds_shards_at(checkpoint_path):
        return call_previous(strategy, previous, "load_checkpoint", checkpoint_path, *args, **kwargs)
    fits, trusted = strategy.lightning_module.trainer.state.fn == "fit", kwargs.get("weights_only") is False
    checkpoint, optimizers = read_for_resume(Path(checkpoint_path), trusted=trusted, optimizers=fits)
    return {**checkpoint, "optimizer_states": [_by_position(state) for state in optimizers]}


def _by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state by the positions of its parameters; sharding strategies save it by their names."""
    groups = state.get("param_groups", [])
    places = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {places[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [places[name] for name in group["params"]]} for group in groups],
    }


def refuse_weights_only(strategy: Any) -> None:
    """Raise LoRAError where a fit with optimizers would go on from a checkpoint without their states."""
    if strategy.optimizers:
        raise LoRAError(
            "LoRACallback: the checkpoint at ckpt_path holds weights only, without the optimizer's state that a fit "
            "goes on with. To start a new fit from them, call load_adapter(model, path) and leave ckpt_path out."
        )


def refuse_other_groups(saved: Sequence[int], built: Sequence[int]) -> None:
    """Raise LoRAError where an optimizer in a checkpoint has other groups than the one that is to take its state.

    Args:
        saved: how many parameters each group in the checkpoint has.
        built: the same of the optimizer that configure_optimizers built.
    """
    if saved != built:
        raise LoRAError(
            f"LoRACallback: the optimizer in the checkpoint has groups of {saved} parameters, and configure_optimizers "
            f"built groups of {built}. Build the same groups, or call load_adapter(model, path) and leave ckpt_path "
            "out to start a new fit."
        )


def refuse_other_number(saved: int, built: int) -> None:
    """Raise LoRAError where a checkpoint holds the states of more or fewer optimizers than are to take them."""
    if saved != built:
        raise LoRAError(
            f"LoRACallback: the checkpoint holds the states of {saved} optimizers, and configure_optimizers built "
            f"{built}. Build as many, or call load_adapter(model, path) and leave ckpt_path out to start a new fit."
        )


def check_complete(handle: AdaptedModel, names: set[str], source: object) -> None:
    """Raise LoRAError unless a state dict without metadata holds the complete base, the complete adapter, or both."""
    base, adapter = set(base_keys(handle)), set(adapter_keys(handle))
    if names in (base | adapter, base, adapter):
        return
    expected = adapter if names & (adapter - base) else base
    expected = expected | base if names & (base - adapter) else expected
    unknown, missing = sorted(names - base - adapter), sorted(expected - names)
    first = f"{unknown[0]!r} has no place in the model" if unknown else f"{missing[0]!r} is missing"
    raise LoRAError(
        f"{source}: a state dict must hold the complete base, the complete adapter or both, but {first} "
        f"({len(missing)} missing, {len(unknown)} unexpected)."
    )
