"""A self-check: merged and factored output of each adapted layer on the input that it really gets.

A layer is compared when it is called. Of a sharded model the first call of each layer is kept and compared on leaving:
W and W' are gathered for it, one layer at a time, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..distributed.sharding import full_tensor, has_sharded, meeting_device
from ..metrics import LayerUse, MergeError
from ..nn.attention import LoRAReader
from ..nn.lora_layer import LoRALayer, adapted_layers
from .merging import restore_shards_

Values = Mapping[nn.Module, Mapping[str, torch.Tensor]]


class Verification:
    """What watch found.

    Attributes:
        names: of the adapted layers.
        error: the metric over all layers.
        use: the metric of which layers ran, and in which the adapter changed the output.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.error, self.use = MergeError().to(device), LayerUse(len(names)).to(device)

    def problems(self) -> str:
        """A sentence for each kind of suspicious layer, or "". Collective, as every torchmetrics Metric is."""
        ran, acted = self.use.compute().tolist()
        used = list(zip(self.names, ran, acted, strict=True))
        never_ran = [name for name, runs, _ in used if not runs]
        no_effect = [name for name, runs, effects in used if runs and not effects]
        sentences = []
        if never_ran:
            sentences.append(f"these adapted layers never ran: {', '.join(never_ran)}")
        if no_effect:
            sentences.append(f"these adapters had no effect: {', '.join(no_effect)}")
        return "; ".join(sentences)


@dataclass
class _Call:
    """One call of a module; `like` tells device and dtype of each parameter in it, which FSDP2 may have cast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    like: Mapping[nn.Module, Mapping[str, tuple[torch.device, torch.dtype]]]

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Call:
        """With another tensor in place of each."""

        def each(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        kwargs = {name: each(value) for name, value in self.kwargs.items()}
        return _Call(tuple(map(each, self.args)), kwargs, change(self.output), self.like)


@dataclass
class _Watched:
    """A module that is called, the adapted layers that act in it, and what came of it."""

    module: nn.Module
    layers: list[LoRALayer]
    call: _Call | None = None
    ran: bool = False
    acted: bool = False

    def parameters(self) -> dict[nn.Module, dict[str, torch.Tensor]]:
        """The live ones of each module concerned."""
        modules = dict.fromkeys([self.module, *self.layers])
        return {m: {name: p for name, p in m._parameters.items() if p is not None} for m in modules}


@contextmanager
def watch(model: nn.Module) -> Iterator[Verification]:
    """Check each adapted layer on its first input inside; the result is complete on leaving.

    Compiled modules run eagerly inside, because a compiled graph passes over hooks. Every rank of a sharded model
    enters and leaves, and keeps a copy of each layer's input and output meanwhile.
    """
    watched, sharded = _groups(model), has_sharded(model)
    found = Verification(list(watched), _device(watched))
    handles = [
        one.module.register_forward_hook(_checker(one, sharded, found.error), with_kwargs=True, prepend=True)
        for one in watched.values()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
            if sharded:
                restore_shards_(model, adapted_layers(model))
                with torch.inference_mode(False):  # in which sharded parameters cannot be detached
                    for one in watched.values():
                        _compare(one, found.error)
        found.use.update([one.ran for one in watched.values()], [one.acted for one in watched.values()])
    finally:
        for handle in handles:
            handle.remove()


def _device(watched: Mapping[str, _Watched]) -> torch.device:
    devices = [meeting_device(one.layers[0].lora_A) for one in watched.values()]
    return devices[-1] if devices else torch.device("cpu")


def _groups(model: nn.Module) -> dict[str, _Watched]:
    """What to watch, by name: attention reads its out_proj instead of calling it."""
    layers = adapted_layers(model)
    groups = {name: _Watched(layer, [layer]) for name, layer in layers.items()}
    readers = {id(m.out_proj): m for m in model.modules() if isinstance(m, (LoRAReader, nn.MultiheadAttention))}
    for name, layer in layers.items():
        reader = readers.get(id(layer))
        if reader is not None:
            groups[name] = _Watched(reader, [layer, reader] if isinstance(reader, LoRALayer) else [layer])
    return {name: group for name, group in groups.items() if not _covered(name, groups)}


def _covered(name: str, groups: Mapping[str, _Watched]) -> bool:
    """An adapted attention is checked together with its adapted out_proj."""
    return isinstance(groups[name].module, nn.MultiheadAttention) and f"{name}.out_proj" in groups


def _checker(one: _Watched, sharded: bool, error: MergeError) -> Callable[..., None]:
    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if one.ran or module is not one.module:  # a copy of the model has this hook too
            return
        one.ran = True
        like = {m: {name: (p.device, p.dtype) for name, p in own.items()} for m, own in one.parameters().items()}
        one.call = _Call(args, kwargs, _first(output), like)
        if sharded:
            one.call = one.call.changed(lambda tensor: tensor.detach().clone())  # a later layer may write into it
        else:
            _compare(one, error)

    return check


@torch.no_grad()
def _compare(one: _Watched, error: MergeError) -> None:
    """Collective where the weights are sharded, also for a rank on which the module never ran."""
    call, one.call = one.call and one.call.changed(full_tensor), None
    base, merged = _weights(one)
    if call is None:
        return
    without, factored = _run(one, call, base, False), _run(one, call, base, True)
    error.update(call.output if one.layers[0].lora.records else _run(one, call, merged, False), factored)
    one.acted = not torch.equal(without, factored)


def _weights(one: _Watched) -> tuple[Values, Values]:
    """All parameters with W, and with W' in its place; whole, see sharding.full."""
    base = one.parameters()
    merged = {module: dict(own) for module, own in base.items()}
    for layer in one.layers:
        originals = {name: layer.original(name) for name in layer.adapted_weights()}
        base[layer].update(originals)
        merged[layer].update(layer.merged_copies(originals, layer.local_blocks(originals, layer.lora_A, layer.lora_B)))
    return _whole(base), _whole(merged)


def _whole(values: Values) -> Values:
    return {module: {name: full_tensor(value) for name, value in own.items()} for module, own in values.items()}


def _run(one: _Watched, call: _Call, values: Values, active: bool) -> torch.Tensor:
    """The module's own forward with other parameters in place of the live ones."""
    before, were_active = one.parameters(), [layer.lora_active for layer in one.layers]
    try:
        for module, own in values.items():
            placed = {name: value.to(*call.like[module][name]) for name, value in own.items()}
            module._parameters.update(cast(dict[str, nn.Parameter | None], placed))
        for layer in one.layers:
            layer.lora_active = active
        return _first(one.module.forward(*call.args, **call.kwargs))
    finally:
        for module, live in before.items():
            module._parameters.update(cast(dict[str, nn.Parameter | None], live))
        for layer, was in zip(one.layers, were_active, strict=True):
            layer.lora_active = was


def _first(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)
