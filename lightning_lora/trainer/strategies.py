"""Strategies of Lightning that need more than hooks, and ModelParallelStrategy's checkpoints.

ModelParallelStrategy saves and loads state dicts without the module's hooks. To save an adapter it would gather the
whole base first. To load an adapter it would ask for the base before any hook could add it. So its two methods are
patched. While they run, the module's state dict holds only the tensors of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import is_sharded, local
from ..errors import LoRAError
from ..exchange.apply import apply_adapter
from ..exchange.checkpoint_of_model import prepare_for_load
from ..formats.deepspeed_folder import file_beside_engine
from ..formats.distributed_folder import holds_optimizers, is_of_fsdp1, read_entries, read_without_values
from ..formats.lightning_checkpoint import adapter_of
from ..model.adapted_model import AdaptedModel, find_model
from ..model.dequantize import dequantize_dtype, quantised_weights
from ..model.foreign_state import foreign_names, load_foreign_
from ..model.initial_values import snapshot_materialised
from ..model.live_state import LiveState
from ..model.patches import call_previous, patch
from ..model.quantise import call_that_quantises
from ..model.state_dict import adapter_keys, merge_state_dict
from ..names import META, canonical
from ..nn.adapted_weights import AdaptedWeights
from ..nn.foreign_entries import ForeignEntries
from .checkpoint_hooks import refuse_foreign_resume
from .deepspeed import prepare_deepspeed
from .distributed_resume import (
    accept_folders,
    check_complete,
    refuse_other_groups,
    refuse_other_number,
    refuse_weights_only,
)
from .fsdp1 import prepare_fsdp1


def prepare_strategy(strategy: Any) -> None:
    """Patch how a strategy saves and loads checkpoints.

    Raises:
        LoRAError: the strategy cannot be used. The message names the alternative.
    """
    names = [cls.__name__ for cls in type(strategy).__mro__]
    if "FSDPStrategy" in names:
        prepare_fsdp1(strategy)
        return
    if "DeepSpeedStrategy" in names:
        prepare_deepspeed(strategy)
    if "ModelParallelStrategy" in names:
        patch(strategy, "lightning_module_state_dict", _state_dict)
        patch(strategy, "load_checkpoint", _load_checkpoint)
    else:
        accept_folders(strategy)


def _state_dict(strategy: Any, previous: Callable[[], Any] | None) -> Any:
    """Gather only the tensors that the module's kind of checkpoint holds: the patched lightning_module_state_dict."""
    module = strategy.lightning_module
    handle = find_model(module)
    kind = handle.record.save if handle is not None else None

    def of_kind(state: Mapping[str, Any]) -> Mapping[str, Any]:
        if handle is not None and kind == "adapter":
            known = {name for name, _, _ in handle.state()}
            return {name: state[name] for name in (*adapter_keys(handle), *foreign_names(handle, state, known))}
        if handle is not None and kind == "merged":
            return merge_state_dict(handle, state, dequantize_dtype(handle.record.dequantize, "checkpoint"))
        return state

    with _state_dict_shown_as(module, of_kind):
        gathered = call_previous(strategy, previous, "lightning_module_state_dict")
    # A tensor gathered from uneven shards has gaps between its rows. torch 2.6 would send the gaps when it loads.
    return {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in gathered.items()}


def _load_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Check a checkpoint, then load only the tensors that it holds: the patched load_checkpoint."""
    module = strategy.lightning_module
    path = Path(file_beside_engine(strategy.broadcast(checkpoint_path)))
    handle = find_model(module)
    if handle is None:
        return call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    snapshot_materialised(handle)
    _refuse_folder_of_fsdp1(path)
    checkpoint = read_without_values(path, before_torch=True)
    loaded = set(map(canonical, checkpoint["state_dict"]))
    adapter, kind = adapter_of(checkpoint) if META in checkpoint else (None, None)
    if adapter is None:
        refuse_foreign_resume(module, checkpoint, loaded)
        check_complete(handle, loaded, path)
    # raises where it does not fit
    prepare_for_load(module, checkpoint, values_follow=True, call_for=call_that_quantises)
    foreign = adapter.foreign if adapter is not None else ForeignEntries()
    loaded -= foreign.values.keys()  # Lightning takes tensors alone, of the sizes that the model has now
    copies, passed_over = [], dict[str, nn.Module]()
    if kind == "merged":
        passed_over = quantised_weights(handle.places)  # they are plain in the file, and stay as they are here
        loaded -= passed_over.keys()
        if path.is_dir():  # the smallest tensor, because torch takes no empty state dict
            state = checkpoint["state_dict"]
            loaded = {min((n for n in loaded if isinstance(state[n], torch.Tensor)), key=lambda n: state[n].numel())}
        copies = _copy_weights(handle, loaded)  # Lightning loads W' into them
    _refuse_quantised(handle, loaded, path)
    strict, module.strict_loading = module._strict_loading, False  # it would miss what is left out by design
    try:
        with (
            _passed_over(passed_over),
            _optimizers_left_alone(strategy, path, checkpoint),
            _state_dict_shown_as(module, lambda state: {name: state[name] for name in state if name in loaded}),
        ):
            content = call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    finally:
        module._strict_loading = strict  # the property would turn None into True
        for layer, leaf, values in copies:  # looked up again: loading may have replaced the parameters
            local(layer.adapted_weights()[leaf]).copy_(values)
    if kind == "merged" and adapter is not None:
        apply_adapter(handle, replace(adapter, foreign=ForeignEntries()))
    load_foreign_(LiveState(handle), _with_values(foreign, path))
    if module.trainer.state.fn == "fit" and path.is_file():
        _load_optimizers_(strategy, content.get("optimizer_states", ()))
    content.pop(META, None)  # so that the module's on_load_checkpoint does not do this again
    return content


def _with_values(foreign: ForeignEntries, path: Path) -> ForeignEntries:
    """Return foreign entries of a file as they are, and those of a folder with values."""
    if not foreign.values or not path.is_dir():
        return foreign
    return replace(foreign, values=read_entries(path, foreign.values))


def _refuse_folder_of_fsdp1(path: Path) -> None:
    """Raise LoRAError for a folder of shards that Lightning could not read here."""
    if is_of_fsdp1(path):
        raise LoRAError(
            f"{path}: FSDPStrategy wrote this folder, with names that ModelParallelStrategy does not look for. Resume "
            "with FSDPStrategy, 'ddp' or one device, or save one file: FSDPStrategy(state_dict_type='full')."
        )


def _refuse_quantised(handle: AdaptedModel, names: Collection[str], path: Path) -> None:
    """Raise LoRAError where a file's plain weights would be loaded over weights that are quantised and sharded."""
    for name, owner in quantised_weights(handle.places).items():
        if name in names and is_sharded(owner._parameters[name.rpartition(".")[2]]):
            raise LoRAError(
                f"{path}: holds the base, but {name!r} is quantised and sharded here. Load the base before "
                "quantize_base and fully_shard, and after them only an adapter or a merged checkpoint."
            )


def _copy_weights(handle: AdaptedModel, names: set[str]) -> list[tuple[AdaptedWeights, str, torch.Tensor]]:
    """Copy this rank's shards of adapted weights, of those with these names."""
    return [
        (layer, leaf, local(weight).clone())
        for name, layer in handle.layers.items()
        for leaf, weight in layer.adapted_weights().items()
        if layer.weight_name(name, leaf) in names
    ]


@contextmanager
def _optimizers_left_alone(strategy: Any, path: Path, checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """Let Lightning load optimizers' states from a folder alone, and for a fit. Those of a file come afterwards.

    Raises:
        LoRAError: a fit would go on from a checkpoint without such states.
    """
    if strategy.lightning_module.trainer.state.fn == "fit":
        if not holds_optimizers(path, checkpoint):
            refuse_weights_only(strategy)
        if path.is_dir():
            yield
            return
    optimizers, strategy.optimizers = strategy.optimizers, []
    try:
        yield
    finally:
        strategy.optimizers = optimizers


def _load_optimizers_(strategy: Any, states: Sequence[Mapping[str, Any]]) -> None:
    """Load the optimizers' states of a file. In place. Collective.

    Lightning would take a parameter's position in the optimizer for that in the module, which groups change.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    if not strategy.optimizers:
        return
    refuse_other_number(len(states), len(strategy.optimizers))
    known = {id(p): canonical(name) for name, p in strategy.lightning_module.named_parameters()}
    options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True, strict=False)
    for optimizer, saved in zip(strategy.optimizers, states, strict=True):
        live = [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        named = _by_names(saved, live)
        if named["state"]:
            set_optimizer_state_dict(strategy.model, optimizer, optim_state_dict=named, options=options)
        else:  # as of plain SGD, for which torch asks in vain on which device the states are
            optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": saved["param_groups"]})


def _by_names(saved: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return an optimizer's state dict by the names of parameters. A sharding strategy has saved it so.

    Args:
        saved: the state dict.
        groups: the names in each group of the optimizer that takes it.

    Raises:
        LoRAError: the optimizer that was saved had other groups.
    """
    held = [group["params"] for group in saved["param_groups"]]
    if any(isinstance(each, str) for params in held for each in params):
        return dict(saved)
    refuse_other_groups(list(map(len, held)), list(map(len, groups)))
    names = dict(zip(chain(*held), chain(*groups), strict=True))
    named = [{**group, "params": names_of} for group, names_of in zip(saved["param_groups"], groups, strict=True)]
    return {"state": {names[number]: value for number, value in saved["state"].items()}, "param_groups": named}


@contextmanager
def _passed_over(weights: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let Lightning pass over these parameters when it loads a single file, as it does over non-persistent buffers."""
    places = [(owner._non_persistent_buffers_set, name.rpartition(".")[2]) for name, owner in weights.items()]
    for names, leaf in places:
        names.add(leaf)
    try:
        yield
    finally:
        for names, leaf in places:
            names.discard(leaf)


@contextmanager
def _state_dict_shown_as(module: nn.Module, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Iterator[None]:
    """Change what module.state_dict() returns, by a function whose argument has names without wrappers' segments."""

    def hook(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        names = {canonical(name.removeprefix(prefix)): name for name in state}
        changed = change({plain: state[name] for plain, name in names.items()})
        state.clear()
        state.update({names[plain]: value for plain, value in changed.items()})

    handle = module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
