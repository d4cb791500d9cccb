"""Readers: modules that read the weight of an adapted layer instead of calling the layer. They read W'.

Examples are nn.MultiheadAttention with its out_proj, torchvision's Swin attention and transformers' Mamba. At injection
the source of a module's methods shows which of them read a weight, and of which layer: `self.proj.weight`. While such a
method runs, a view takes the layer's place. The view computes W' when the weight is read, and calls the layer
when it is called. A method that could read the weight but does not costs next to nothing.

A list of known classes would not do: of the 8,525 module classes of torch 2.13, torchvision 0.28, timm 1.0.31 and
transformers 5.24, 138 read a weight of a module inside of them, in more than a hundred model families. Those whose
layers people adapt are the Swin attentions of torchvision and timm, BEiT, EVA, WavLM, and the mixers of Mamba, Jamba,
Bamba, FalconMamba, NemotronH and Zamba.

A read through a variable or an argument is not found. An adapter that is never called gets no gradient, and a warning
names it (model/gradients.py). A function inside of a method that runs again after the method would read W; where
reentrant checkpointing is to call it again in backward, its first reading is refused.

nn.TransformerEncoder and its layers read all weights on a fast path in evaluation mode. That path is switched off while
an adapter inside is not merged.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import nn

from ..errors import LoRAError
from .adapted_module import Swapped, adapted_layers, layer_adapter, swapped_class
from .adapted_weights import AdaptedWeights
from .gradient_checkpointing import in_first_pass
from .low_rank import IN_PROJ
from .parameter import LoRAParameterHolder

Path = tuple[str, ...]  # attribute names that lead from a module to a module inside it
WEIGHTS = {"weight", IN_PROJ}
ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")  # the search begins here
# These are not searched. torch's transformer layers read weights on their fast paths only, which are switched off while
# an adapter is active.
NOT_SEARCHED = ("torch.nn.modules.module", "torch.nn.modules.transformer", "lightning", "pytorch_lightning")
# What is the same for W'; and `data`, which code writes to and autograd does not follow.
FACTS = ("data", "dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta")
READ = re.compile(
    rf"(?<!isinstance\()\bself((?:\.\w+)+)\.(?:{'|'.join(sorted(WEIGHTS))})\b(?!\.(?:{'|'.join(FACTS)})\b)(?!\s*=[^=])"
)

# Attributes that a module checks before it takes its fast path, and uses for nothing else. A forward hook would keep a
# layer off its fast path too, but torch.compile has guards on these attributes and none on hooks.
SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",  # the layers' slow path rejects nested tensors
}


class LayerView:
    """Takes an adapted layer's place in a reading method. Its weight is W'; all else is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "dense", None)
        object.__setattr__(self, "has_graph", torch.is_grad_enabled())  # when the method began

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("layer", "dense", "has_graph"):  # not set yet; torch.compile asks for them that early
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        adapter = layer_adapter(self.layer) if name in WEIGHTS else None
        if adapter is None or name != adapter.weight_leaf:
            return getattr(self.layer, name)
        if self.has_graph and in_first_pass():  # so the segment began inside of the method
            raise LoRAError(
                f"{adapter.lora.name!r}: its weight is read in a function that torch.utils.checkpoint with "
                "use_reentrant=True calls again in backward, where it would read the weight without the adapter, so "
                "that gradients would be wrong. Make the function a method of the module, which is followed there "
                "too, or leave the layer out (exclude_modules)."
            )
        # A first reading without a graph, such as of a norm in no_grad, must not serve one that trains the adapter.
        if self.dense is None or (torch.is_grad_enabled() and not self.dense.requires_grad):
            object.__setattr__(self, "dense", adapter.dense_weight(adapter.adapted_weight()))
        return self.dense

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.layer, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LoRAError(
            f"{type(self.layer).__name__}: a copy or a pickle is made inside a method that reads the layer's weight, "
            "while a view takes the layer's place; make it outside of the method."
        )

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance
        return type(object.__getattribute__(self, "__dict__").get("layer", self))


class LoRAReader(Swapped):
    """A module with methods that read the weight of an adapted layer inside it."""

    lora_reads: Sequence[Path] = ()  # paths to the layers; empty in an instance that a program makes from this class

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in weight_reads(vars(cls)["lora_base"]) if "lora_base" in vars(cls) else ():
            setattr(cls, name, _with_views(cls.lora_base, name))


def patch_readers(modules: Iterable[nn.Module]) -> None:
    """Turn each module that reads the weight of an adapted layer into a LoRAReader, and other readers back. In place.

    Args:
        modules: all modules of a model.

    Raises:
        LoRAError: a module reads the weight of an adapted layer and holds a parameter that is adapted by itself.
    """
    for module in modules:
        if isinstance(module, LoRAReader):
            paths = _paths_to_layers(module, module.lora_base)
            if paths:
                vars(module)["lora_reads"] = paths
            else:
                undo_readers([module])
        elif isinstance(module, LoRAParameterHolder):
            known = isinstance(module, nn.MultiheadAttention)  # its holder knows out_proj
            paths = [] if known else _paths_to_layers(module, module.lora_base)
            if paths:
                parameter = next(iter(module.lora_parameters.values())).lora.name
                raise LoRAError(
                    f"inject: {parameter!r} is adapted by itself, and its {module.lora_base.__name__} reads the weight "
                    f"of the adapted layer {'.'.join(paths[0])!r}; adapt only one of the two (target_parameters, "
                    "exclude_modules)."
                )
        elif not isinstance(module, Swapped):
            paths = _paths_to_layers(module, type(module))
            if paths:
                vars(module)["lora_reads"] = paths
                module.__class__ = swapped_class(LoRAReader, type(module))


def undo_readers(modules: Iterable[nn.Module]) -> None:
    """Turn readers back, before more layers are adapted: a reader may be one of them. In place."""
    for module in modules:
        if isinstance(module, LoRAReader):
            vars(module).pop("lora_reads", None)
            module.__class__ = module.lora_base  # type: ignore[assignment]


def update_fast_paths(modules: Iterable[nn.Module]) -> None:
    """Switch off the fast path of each transformer encoder and its layers with an active adapter inside. In place.

    Without an active adapter inside, the fast path is allowed again. If adapters are merged, it reads W'.

    Args:
        modules: all modules of a model.
    """
    kinds = tuple(SWITCHES)
    for module in modules:
        for kind, switch in SWITCHES.items() if isinstance(module, kinds) else ():
            if isinstance(module, kind):
                active = any(layer.lora_active for layer in adapted_layers(module).values())
                before = f"lora_{switch}"  # attribute that keeps the switch's former value
                if active:
                    if before not in vars(module):
                        setattr(module, before, getattr(module, switch, False))
                    setattr(module, switch, False)
                elif before in vars(module):
                    setattr(module, switch, vars(module)[before])
                    delattr(module, before)


def read_layers(reader: LoRAReader) -> list[AdaptedWeights]:
    """Return the adapters of the layers whose weights a reader's methods may read."""
    adapters = (_adapter_at(reader, path) for path in reader.lora_reads)
    return [adapter for adapter in adapters if adapter is not None]


def _with_views(base: type[nn.Module], name: str) -> Callable[..., Any]:
    """Return a method of the base class, wrapped so that views take the place of active adapted layers meanwhile."""

    @functools.wraps(getattr(base, name))
    def method(self: LoRAReader, *args: Any, **kwargs: Any) -> Any:
        layers = read_layers(self)
        if not any(layer.lora_active for layer in layers):
            return getattr(base, name)(self, *args, **kwargs)
        # One thread at a time runs with views. A compiler traces one thread, so there is nothing to lock.
        with nullcontext() if torch.compiler.is_compiling() else layers[0].lora.lock:
            viewed: dict[Path, nn.Module] = {}
            for path in self.lora_reads:
                layer, adapter = cast(Any, _inside(self, path)), _adapter_at(self, path)
                if layer is None or adapter is None or not adapter.lora_active:
                    continue
                # A reading method that calls this one may have put a view there already. It serves here too, unless a
                # reentrant segment has begun since, which runs this method again and not the other one.
                if not _is_view(layer) or (layer.has_graph and in_first_pass()):
                    viewed[path] = layer
                    view = LayerView(layer.layer if _is_view(layer) else layer)
                    _modules_around(self, path)[path[-1]] = cast(nn.Module, view)
            try:
                return getattr(base, name)(self, *args, **kwargs)
            finally:
                for path, layer in viewed.items():
                    if _is_view(_inside(self, path)):  # otherwise the method itself has put another layer there
                        _modules_around(self, path)[path[-1]] = layer

    return method


def _is_view(module: object) -> bool:
    return type(module) is LayerView


def _adapter_at(module: nn.Module, path: Path) -> AdaptedWeights | None:
    """Return the adapter of the layer at a path from a module; another thread may have put a view there."""
    layer = _inside(module, path)
    return layer_adapter(cast(LayerView, layer).layer if _is_view(layer) else layer)


def _inside(module: nn.Module | None, path: Path) -> nn.Module | None:
    for name in path:
        module = module._modules.get(name) if module is not None else None
    return module


def _modules_around(reader: LoRAReader, path: Path) -> dict[str, nn.Module | None]:
    return cast(nn.Module, _inside(reader, path[:-1]))._modules


def _paths_to_layers(module: nn.Module, cls: type[nn.Module]) -> list[Path]:
    paths = sorted({path for found in weight_reads(cast(Any, cls)).values() for path in found})
    return [path for path in paths if layer_adapter(_inside(module, path)) is not None]


@functools.cache
def weight_reads(cls: type[nn.Module]) -> Mapping[str, set[Path]]:
    """Return the paths to the modules whose weights the methods of a class read, by the name of the method.

    Methods count that a forward or a step names, directly or by others.
    """
    reads: dict[str, set[Path]] = {}
    pending, followed = set(ENTRIES), set()
    while pending:
        name = pending.pop()
        followed.add(name)
        for parent in cls.__mro__:  # super() may call any of them
            function = inspect.unwrap(vars(parent)[name]) if callable(vars(parent).get(name)) else None
            # The body of a generator runs after the call, when no view is there any more.
            if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
                continue
            if f"{function.__module__}.".startswith(tuple(f"{library}." for library in NOT_SEARCHED)):
                continue
            used = _names(function.__code__)
            pending |= used - followed
            if WEIGHTS.isdisjoint(used):  # finding the source takes time
                continue
            try:
                source = inspect.getsource(function)
            except OSError:  # made by exec, or shipped without its source
                continue
            paths = {tuple(found[1].split(".")[1:]) for found in READ.finditer(source)}
            if paths:
                reads.setdefault(name, set()).update(paths)
    return reads


def _names(code: CodeType) -> set[str]:
    """Return the attributes and globals that code names, and the functions that it defines."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
