"""A self-check: merged and factored output of each adapted layer on the input that it really gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from .base import LoRALayer
from .errors import LoRAError
from .merge import adapted_layers
from .metrics import MergeError
from .readers import LoRAReader
from .sharding import has_sharded


@dataclass
class Verification:
    """What watch found.

    Attributes:
        error: the metric over all layers.
        never_ran: names of adapted layers that were not called.
        no_effect: names of layers whose adapter did not change the output.
    """

    error: MergeError = field(default_factory=MergeError)
    never_ran: list[str] = field(default_factory=list)
    no_effect: list[str] = field(default_factory=list)

    def problems(self) -> str:
        """A sentence for each kind of suspicious layer, or ""."""
        sentences = []
        if self.never_ran:
            sentences.append(f"these adapted layers never ran: {', '.join(self.never_ran)}")
        if self.no_effect:
            sentences.append(f"these adapters had no effect: {', '.join(self.no_effect)}")
        return "; ".join(sentences)


@contextmanager
def watch(model: nn.Module) -> Iterator[Verification]:
    """Check each adapted layer on its first input inside; the result is complete on leaving.

    Compiled modules run eagerly inside, because a compiled graph passes over hooks.

    Raises:
        LoRAError: the model is sharded, so that no rank has both W and W' of a layer.
    """
    if has_sharded(model):
        raise LoRAError(
            f"verify: {type(model).__name__} is sharded, and no rank holds both W and W' of a layer; leave verify off, "
            "and compare a validation with merged_eval=False."
        )
    found = Verification()
    groups = _groups(model)
    for _, layers in groups.values():
        found.error.to(layers[0].lora_A.device)
    found.never_ran = list(groups)
    handles = [
        group[0].register_forward_hook(_checker(name, *group, found), with_kwargs=True, prepend=True)
        for name, group in groups.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _groups(model: nn.Module) -> dict[str, tuple[nn.Module, list[LoRALayer]]]:
    """What to watch, by name, with the layers that act in it: attention reads its out_proj instead of calling it."""
    layers = adapted_layers(model)
    groups: dict[str, tuple[nn.Module, list[LoRALayer]]] = {name: (layer, [layer]) for name, layer in layers.items()}
    readers = {id(m.out_proj): m for m in model.modules() if isinstance(m, (LoRAReader, nn.MultiheadAttention))}
    for name, layer in layers.items():
        reader = readers.get(id(layer))
        if reader is not None:
            acting = [layer, reader] if isinstance(reader, LoRALayer) else [layer]
            groups[name] = (reader, acting)
    return {name: group for name, group in groups.items() if not _covered(name, groups)}


def _covered(name: str, groups: Mapping[str, tuple[nn.Module, list[LoRALayer]]]) -> bool:
    """An adapted attention is checked together with its adapted out_proj."""
    return isinstance(groups[name][0], nn.MultiheadAttention) and f"{name}.out_proj" in groups


def _checker(name: str, watched: nn.Module, layers: list[LoRALayer], found: Verification) -> Callable[..., None]:
    def check(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if name not in found.never_ran or module is not watched:  # a copy of the model has this hook too
            return
        found.never_ran.remove(name)
        with torch.no_grad():
            originals = [{leaf: layer.original(leaf) for leaf in layer.adapted_weights()} for layer in layers]
            merged: list[dict[str, torch.Tensor]] = [
                layer.merged_copies(weights, layer.local_pieces(weights, layer.lora_A, layer.lora_B))
                for layer, weights in zip(layers, originals, strict=True)
            ]
            base = _run(module, layers, originals, False, args, kwargs)
            factored = _run(module, layers, originals, True, args, kwargs)
            live = output if layers[0].lora_kept else _run(module, layers, merged, False, args, kwargs)
            found.error.update(_first(live), factored)
            if torch.equal(base, factored):
                found.no_effect.append(name)

    return check


def _run(
    module: nn.Module,
    layers: list[LoRALayer],
    weights: list[dict[str, torch.Tensor]],
    active: bool,
    args: Any,
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    """The module's own forward with other weights in place of the live ones."""
    before = [(layer.adapted_weights(), layer.lora_active) for layer in layers]
    try:
        for layer, replacing in zip(layers, weights, strict=True):
            layer._parameters.update(cast(dict[str, nn.Parameter | None], replacing))
            layer.lora_active = active
        return _first(module.forward(*args, **kwargs))
    finally:
        for layer, (live, was_active) in zip(layers, before, strict=True):
            layer._parameters.update(live)
            layer.lora_active = was_active


def _first(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)
