"""Check merging: compare merged and factored outputs of each adapted layer on the inputs that it gets in a run.

A layer is compared at its first call. In a sharded model the first call of each layer is stored and compared at the
end, because W and W' are gathered one layer at a time, in the same order on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from ..distributed.sharding import full_tensor, holds_shards, is_sharded, local, meeting_device
from ..metrics import LayerUse, MergeError
from ..names import listed
from ..nn.adapted_weights import AdaptedWeights, active_as, adapted_places
from ..nn.lora_layer import LoRALayer
from ..nn.low_rank import HALF
from ..nn.readers import LoRAReader, read_layers
from .adapted_model import Listing
from .merging import restore_shards_

Parameters = Mapping[nn.Module, Mapping[str, torch.Tensor]]


OTHER_FORWARD = "Is the forward another than the one you adapted"


class Verification:
    """The result of watch: the error over all layers, which layers ran, and which adapters changed their output."""

    def __init__(self, watched: Mapping[str, _Watched], device: torch.device) -> None:
        self.names = list(watched)
        self.error, self.use = MergeError().to(device), LayerUse(len(watched)).to(device)
        self.never_ran: list[str] = []
        self.no_effect: list[str] = []
        self._watched = watched
        self._at_start = {name for name, each in watched.items() if all(map(_is_at_start, each.layers))}

    def problems(self) -> str:
        """Return a sentence on layers that never ran and adapters without effect, or "". Collective (torchmetrics)."""
        ran, acted = self.use.compute().tolist()
        self.never_ran = [name for name, runs in zip(self.names, ran, strict=True) if not runs]
        self.no_effect = [name for name, runs, acts in zip(self.names, ran, acted, strict=True) if runs and not acts]
        problems = {"these adapted layers never ran": self.never_ran, "these adapters had no effect": self.no_effect}
        return "; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names)

    def report(self) -> str:
        """Return the problems with what explains them, or "". Collective (torchmetrics)."""
        problems = self.problems()
        at_start = [name for name in self.no_effect if name in self._at_start]
        if not at_start:
            return problems and f"{problems}. {self._question()}"
        explained = at_start == [*self.never_ran, *self.no_effect]
        which = "They have" if explained else f"{listed(at_start)} {'has' if len(at_start) == 1 else 'have'}"
        text = f"{problems}. {which} the values that adapters begin with: nothing has trained or loaded them yet."
        return text if explained else f"{text} {self._question()}"

    def _question(self) -> str:
        """Ask for what explains the problems. Outputs in 16 bits do not show a small change."""
        trained = [self._watched[name] for name in self.no_effect if name not in self._at_start]
        dtypes = [str(each.dtype).removeprefix("torch.") for each in trained if each.dtype in HALF]
        small = f", or is the change too small for outputs in {dtypes[0]}" if dtypes else ""
        return f"{OTHER_FORWARD}{small}?"


@dataclass
class _Call:
    """A call of a module.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        output: what the call returned, of a tuple the first value.
        like: device and dtype of each parameter during the call, which FSDP2 may have moved or cast.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    like: Mapping[nn.Module, Mapping[str, tuple[torch.device, torch.dtype]]]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Call:
        """Return the call with each tensor changed."""
        args = tuple(change(value) if isinstance(value, torch.Tensor) else value for value in self.args)
        kwargs = {n: change(value) if isinstance(value, torch.Tensor) else value for n, value in self.kwargs.items()}
        return _Call(args, kwargs, change(self.output), self.like)


@dataclass
class _Watched:
    """A module with adapted layers, and its first call.

    Attributes:
        module: the module to call; where `readers` read the layer too, the first of all these that was called.
        layers: the adapted layers that act in the module.
        readers: other modules that read the layer's weight.
        call: the first call, until it was compared.
        ran: the module was called.
        acted: the adapter changed the output.
        dtype: of the output.
    """

    module: nn.Module
    layers: list[AdaptedWeights]
    readers: list[nn.Module] = field(default_factory=list)
    call: _Call | None = None
    ran: bool = False
    acted: bool = False
    dtype: torch.dtype | None = None

    def parameters(self) -> dict[nn.Module, dict[str, torch.Tensor]]:
        """Return the own live parameters of the module and of the layers' modules, by module and name."""
        modules = [self.module, *(holder for layer in self.layers for holder in layer.lora_holders())]
        return {m: {name: p for name, p in m._parameters.items() if p is not None} for m in modules}


@contextmanager
def watch(listing: Listing) -> Iterator[Verification]:
    """Check each adapted layer on its first input inside the block. The result is complete after the block.

    Compiled modules run eagerly inside, because compiled code does not call hooks. Collective: every rank of a sharded
    model enters and leaves. A sharded model stores a copy of each layer's first input and output meanwhile.
    """
    watched, sharded = _modules_to_watch(listing), any(holds_shards(module) for _, module in listing.modules)
    devices = [meeting_device(each.layers[0].factors()[0]) for each in watched.values()]
    verification = Verification(watched, devices[-1] if devices else torch.device("cpu"))
    handles = [
        module.register_forward_hook(_checker(each, sharded, verification.error), with_kwargs=True, prepend=True)
        for each in watched.values()
        for module in (each.module, *each.readers)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield verification
            if sharded:
                restore_shards_(listing)
                with torch.inference_mode(False):  # in which sharded parameters cannot be detached
                    for each in watched.values():
                        _compare(each, verification.error)
        verification.use.update([each.ran for each in watched.values()], [each.acted for each in watched.values()])
    finally:
        for handle in handles:
            handle.remove()


def _is_at_start(layer: AdaptedWeights) -> bool:
    """Return whether an adapter has values of its start, which have no effect, as far as this rank's shards show."""
    stored = {leaf: local(tensor) for leaf, tensor in layer.stored().items()}
    return layer.lora.spec.variant.is_initial(stored, layer.place()) is True


def _modules_to_watch(listing: Listing) -> dict[str, _Watched]:
    """Return what to watch, by the layer's name: for an adapted out_proj the attention that reads it."""
    found = adapted_places(listing.model, modules=listing.modules)
    places = {name: (module, adapter) for name, module, adapter in found}
    readers: dict[AdaptedWeights, list[nn.Module]] = defaultdict(list)
    attentions: dict[nn.Module, LoRALayer] = {}
    for _, module in listing.modules:
        if isinstance(module, LoRAReader):
            for read in read_layers(module):
                readers[read].append(module)
        elif isinstance(module, nn.MultiheadAttention) and isinstance(module, LoRALayer):
            attentions[module.out_proj] = module
    watched = {name: _Watched(module, [layer], readers[layer]) for name, (module, layer) in places.items()}
    for name, (module, layer) in places.items():
        if module in attentions:
            attention = attentions[module]
            watched[name] = _Watched(attention, [layer, attention])
    return {  # an adapted attention is checked together with its adapted out_proj
        name: each
        for name, each in watched.items()
        if not isinstance(each.module, nn.MultiheadAttention) or f"{name}.out_proj" not in watched
    }


def _checker(watched: _Watched, sharded: bool, error: MergeError) -> Callable[..., None]:
    """Return a forward hook that compares the first call, or stores it where the model is sharded."""

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if watched.ran or module not in (watched.module, *watched.readers):  # a copied module has this hook, too
            return
        watched.ran, watched.module = True, module
        like = {m: {n: (p.device, p.dtype) for n, p in live.items()} for m, live in watched.parameters().items()}
        watched.call = _Call(args, kwargs, _first(output), like)
        if sharded:
            watched.call = watched.call.map(lambda tensor: tensor.detach().clone())  # a later layer may write into it
        else:
            _compare(watched, error)

    return check


@torch.no_grad()
def _compare(watched: _Watched, error: MergeError) -> None:
    """Compare the call with the other way to compute it: merged with factored, and with the adapter off.

    Collective where the weights are sharded, even for a rank on which the module never ran.
    """
    call, watched.call = watched.call and watched.call.map(full_tensor), None
    base, merged = _weights(watched)
    if call is None:
        return
    without, factored = _run(watched, call, base, False), _run(watched, call, base, True)
    as_evaluated = watched.layers[0].lora.records or watched.layers[0].quantised()
    error.update(call.output if as_evaluated else _run(watched, call, merged, False), factored)
    watched.acted, watched.dtype = not torch.equal(without, factored), factored.dtype


def _weights(watched: _Watched) -> tuple[Parameters, Parameters]:
    """Return all parameters with W, and all parameters with W' in place of W, as whole tensors. Collective."""
    base, merged = watched.parameters(), watched.parameters()
    for layer in watched.layers:
        if layer.quantised():  # its own forward reads the quantised W, which stays in place unless it is sharded
            if not is_sharded(layer.main_weight()):
                del base[layer.lora_holder], merged[layer.lora_holder]
            continue
        originals = {name: layer.original(name) for name in layer.adapted_weights()}
        copies = layer.merged_copies(originals, layer.blocks(originals))
        for holder in layer.lora_holders():
            base[holder].update(originals)
            merged[holder].update(copies)
    return _full(base), _full(merged)


def _full(parameters: Parameters) -> Parameters:
    return {module: {n: full_tensor(value) for n, value in values.items()} for module, values in parameters.items()}


def _run(watched: _Watched, call: _Call, parameters: Parameters, active: bool) -> torch.Tensor:
    """Return the output of the module's forward with other parameters, and the adapters acting or not."""
    live = watched.parameters()
    try:
        for module, values in parameters.items():
            placed = {name: _placed(value, call.like[module][name]) for name, value in values.items()}
            module._parameters.update(cast(dict[str, nn.Parameter | None], placed))
        with active_as(watched.layers, active):
            return _first(watched.module.forward(*call.args, **call.kwargs))
    finally:
        for module, values in live.items():
            module._parameters.update(cast(dict[str, nn.Parameter | None], values))


def _placed(value: torch.Tensor, like: tuple[torch.device, torch.dtype]) -> torch.Tensor:
    return value if (value.device, value.dtype) == like else value.to(*like)  # a quantised tensor must not be cast


def _first(output: Any) -> torch.Tensor:
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)
