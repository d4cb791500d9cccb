"""Record what runs: operators of a call, graphs that torch.compile makes, bytes that a rank sends, walks of a model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora.model import adapted_model


class Operators(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    recorder = Operators()
    with torch.no_grad(), recorder:
        model(x)
    return recorder.seen


class Recorder:
    """A backend that keeps each graph and runs it eagerly, so that outputs are those without torch.compile."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def code(self) -> str:
        return str(self.graphs[-1].code)


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget all graphs, and let eager dropout draw the same bits as compiled dropout."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("lightning_lora.nn.lora_layer.drop", lambda x, p: (F.dropout(x, p), 1.0))


class Traffic(TorchDispatchMode):
    """A mode that records collectives. DTensors dispatch to their shards first."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(("wait", "_wrap")):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            inputs = tensors[1:] if func.__name__.startswith(("_allgather_base_", "_reduce_scatter_base_")) else tensors
            self.sent.append((func.__name__.split(".")[0], sum(t.nbytes for t in inputs)))
        return func(*args, **kwargs or {})

    def bytes(self, *names: str) -> int:
        """Bytes put into collectives whose name contains one of `names`, or into all without names."""
        return sum(size for name, size in self.sent if not names or any(part in name for part in names))


METHODS = ("named_modules", "modules", "named_parameters", "parameters", "named_buffers", "buffers", "state_dict")


@contextmanager
def counted_walks(*models: nn.Module) -> Iterator[Counter[str]]:
    """Count the walks of these modules inside, by the method that was called and the line that called it.

    A walk that torch makes as a part of another one is not counted: named_parameters calls named_modules.
    """
    walks: Counter[str] = Counter()
    whole = {id(model) for model in models}
    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:
            patch.setattr(nn.Module, name, _counting(getattr(nn.Module, name), whole, walks))
        patch.setattr(adapted_model, "list_places", _counting(adapted_model.list_places, whole, walks))
        yield walks


def _counting(original: Callable[..., Any], whole: set[int], walks: Counter[str]) -> Callable[..., Any]:
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if id(self) in whole and caller.f_code.co_filename != sys.modules[nn.Module.__module__].__file__:
            walks[f"{original.__name__} in {caller.f_code.co_filename}:{caller.f_lineno}"] += 1
        return original(self, *args, **kwargs)

    return counting
