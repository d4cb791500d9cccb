"""Strategies of Lightning that need more than hooks: two that are refused, and ModelParallelStrategy's checkpoints.

ModelParallelStrategy assembles and loads state dicts by itself. Saving an adapter, it would gather the whole base, only
to leave it out afterwards; loading one, it misses the base before any hook could complete it. So its two methods are
patched, and while they run the module's state dict shows what the checkpoint is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.lightning_checkpoint import Kind, adapter_of, read
from ..adapter.save_load import apply_adapter
from ..distributed.sharding import local
from ..errors import LoRAError
from ..model.injection import find_injection, snapshot_materialised
from ..model.patches import call_previous, patch
from ..model.state_dict import adapter_keys, base_keys, merge_state_dict
from ..names import META, canonical
from ..nn.lora_layer import adapted_layers

HEADER = "meta.pt"  # Lightning's name of what a distributed checkpoint holds beside its shards

REFUSED = {
    "DeepSpeedStrategy": "it saves and loads through an engine that passes over a callback's checkpoint, and its stage "
    "3 leaves no weight to merge into",
    "FSDPStrategy": "FSDP1 keeps weights as pieces of flat buffers, which cannot be merged into and restored exactly",
}


def prepare_strategy(strategy: Any) -> None:
    """Refuse what cannot be right, and teach the others what they need.

    Raises:
        LoRAError: names the reason and the alternative.
    """
    names = [cls.__name__ for cls in type(strategy).__mro__]
    for name in names:
        if name in REFUSED:
            raise LoRAError(
                f"LoRACallback: {name} cannot be used: {REFUSED[name]}. Use ModelParallelStrategy with fully_shard "
                "(FSDP2) in configure_model, or strategy='ddp' where the base fits on one device."
            )
    if "ModelParallelStrategy" in names:
        patch(strategy, "lightning_module_state_dict", _state_dict)
        patch(strategy, "load_checkpoint", _load_checkpoint)


def _state_dict(strategy: Any, previous: Callable[[], Any] | None) -> Any:
    """The patched lightning_module_state_dict: what the kind of checkpoint holds, and no more, is gathered."""
    module = strategy.lightning_module
    found = find_injection(module)
    with _showing(module, lambda state: _of_kind(module, state, found.record.save if found else None)):
        return call_previous(strategy, previous, "lightning_module_state_dict")


def _of_kind(module: nn.Module, state: Mapping[str, Any], kind: Kind | None) -> Mapping[str, Any]:
    if kind == "adapter":
        return {name: state[name] for name in adapter_keys(module)}
    return merge_state_dict(module, state) if kind == "merged" else state


def _load_checkpoint(
    strategy: Any, previous: Callable[..., Any] | None, checkpoint_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """The patched load_checkpoint: checks first, then loads what the checkpoint holds, and leaves the rest alone."""
    module = strategy.lightning_module
    path = Path(strategy.broadcast(checkpoint_path))
    if find_injection(module) is None:
        return call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    snapshot_materialised(module)
    content = _content(path, kwargs.get("weights_only"))
    given = set(content["state_dict"])
    adapter, kind = adapter_of(content) if META in content else (None, None)
    if adapter is None:
        _check_whole(module, given, path)
    read(module, content)  # raises where it does not fit
    kept = {}
    if kind == "merged":
        if path.is_dir():  # one tensor, because torch takes no empty state dict
            given = {min(given, key=lambda name: content["state_dict"][name].numel())}
        kept = _weights(module, given)  # Lightning loads W' into them
    chosen, module.strict_loading = module._strict_loading, False  # it would miss what is left out by design
    try:
        with _showing(module, lambda state: {name: state[name] for name in state if name in given}):
            loaded = call_previous(strategy, previous, "load_checkpoint", path, *args, **kwargs)
    finally:
        module._strict_loading = chosen  # the property would turn an unset one into True
        for weight, values in kept.items():
            weight.copy_(values)
    if kind == "merged" and adapter is not None:
        apply_adapter(module, adapter)
    loaded.pop(META, None)  # done; the module's on_load_checkpoint has nothing to complete
    return loaded


def _content(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint without the values of a distributed one, whose tensors are on the meta device."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # slow to import, and rarely needed
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if path.is_file():
        content: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        return content
    if not (path / HEADER).is_file():
        raise LoRAError(f"{path}: neither a checkpoint file nor a folder with a distributed checkpoint.")
    content = torch.load(path / HEADER, map_location="cpu", weights_only=weights_only)
    shards = FileSystemReader(path).read_metadata().state_dict_metadata
    content["state_dict"] = {
        name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in shards.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    return content


def _check_whole(module: nn.Module, given: set[str], path: Path) -> None:
    """A checkpoint of another program holds the complete base, the complete adapter or both."""
    base, adapter = set(base_keys(module)), set(adapter_keys(module))
    for wanted in (base | adapter, base, adapter):
        if given == wanted:
            return
    unknown, missing = sorted(given - base - adapter), sorted((adapter if given & (adapter - base) else base) - given)
    first = f"{unknown[0]!r} has no place in the model" if unknown else f"{missing[0]!r} is missing"
    raise LoRAError(
        f"{path}: a state dict must hold the complete base, the complete adapter or both, but {first} "
        f"({len(missing)} missing, {len(unknown)} unexpected)."
    )


def _weights(module: nn.Module, names: set[str]) -> dict[torch.Tensor, torch.Tensor]:
    """The shards of adapted weights of these names, each with a copy of its values."""
    weights = {
        f"{name}.{leaf}": weight
        for name, layer in adapted_layers(module).items()
        for leaf, weight in layer.adapted_weights().items()
    }
    return {shard: shard.clone() for shard in (local(weight) for name, weight in weights.items() if name in names)}


@contextmanager
def _showing(module: nn.Module, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Iterator[None]:
    """Inside, module.state_dict() gives what `change` makes of it; names are those without wrappers."""

    def hook(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        raw = {canonical(name.removeprefix(prefix)): name for name in state}
        shown = change({plain: state[name] for plain, name in raw.items()})
        state.clear()
        state.update({raw[plain]: value for plain, value in shown.items()})

    handle = module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
