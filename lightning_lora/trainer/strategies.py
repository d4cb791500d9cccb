"""Strategies of Lightning that need more than hooks, and ModelParallelStrategy's checkpoints.

ModelParallelStrategy saves and loads state dicts without the module's hooks. To save an adapter it would gather the
whole base first. To load an adapter it would ask for the base before any hook could add it. So its two methods are
patched. While they run, the module's state dict holds only the tensors of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed.sharding import local
from ..exchange.apply import apply_adapter
from ..exchange.checkpoint_of_model import prepare_for_load
from ..formats.distributed_folder import read_without_values
from ..formats.lightning_checkpoint import adapter_of
from ..model.adapted_model import AdaptedModel, find_model
from ..model.initial_values import snapshot_materialised
from ..model.patches import call_previous, patch
from ..model.state_dict import adapter_keys, merge_state_dict
from ..names import META, canonical
from ..nn.adapted_weights import AdaptedWeights
from .checkpoint_hooks import refuse_foreign_resume
from .deepspeed import prepare_deepspeed
from .distributed_resume import accept_folders, check_complete
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
            return {name: state[name] for name in adapter_keys(handle)}
        return merge_state_dict(handle, state) if handle is not None and kind == "merged" else state

    with _state_dict_shown_as(module, of_kind):
        gathered = call_previous(strategy, previous, "lightning_module_state_dict")
    # A tensor gathered from uneven shards has gaps between its rows. torch 2.6 would send the gaps when it loads.
    return {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in gathered.items()}


def _load_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Check a checkpoint, then load only the tensors that it holds: the patched load_checkpoint."""
    module = strategy.lightning_module
    path = Path(strategy.broadcast(checkpoint_path))
    handle = find_model(module)
    if handle is None:
        return call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    snapshot_materialised(handle)
    checkpoint = read_without_values(path, before_torch=True)
    loaded = set(map(canonical, checkpoint["state_dict"]))
    adapter, kind = adapter_of(checkpoint) if META in checkpoint else (None, None)
    if adapter is None:
        refuse_foreign_resume(module, checkpoint, loaded)
        check_complete(handle, loaded, path)
    prepare_for_load(module, checkpoint, values_follow=True)  # raises where it does not fit
    copies = []
    if kind == "merged":
        if path.is_dir():  # the smallest tensor, because torch takes no empty state dict
            state = checkpoint["state_dict"]
            loaded = {min((n for n in loaded if isinstance(state[n], torch.Tensor)), key=lambda n: state[n].numel())}
        copies = _copy_weights(handle, loaded)  # Lightning loads W' into them
    strict, module.strict_loading = module._strict_loading, False  # it would miss what is left out by design
    try:
        with _state_dict_shown_as(module, lambda state: {name: state[name] for name in state if name in loaded}):
            content = call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    finally:
        module._strict_loading = strict  # the property would turn None into True
        for layer, leaf, values in copies:  # looked up again: loading may have replaced the parameters
            local(layer.adapted_weights()[leaf]).copy_(values)
    if kind == "merged" and adapter is not None:
        apply_adapter(handle, adapter)
    content.pop(META, None)  # so that the module's on_load_checkpoint does not do this again
    return content


def _copy_weights(handle: AdaptedModel, names: set[str]) -> list[tuple[AdaptedWeights, str, torch.Tensor]]:
    """Copy this rank's shards of adapted weights, of those with these names."""
    return [
        (layer, leaf, local(weight).clone())
        for name, layer in handle.layers.items()
        for leaf, weight in layer.adapted_weights().items()
        if layer.weight_name(name, leaf) in names
    ]


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
