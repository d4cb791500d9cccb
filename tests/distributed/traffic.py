"""What a block of code sends: each collective of a rank, with its name and the bytes that the rank puts in."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """A mode that notes collectives; DTensors are left to dispatch to their shards first."""

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
        """Bytes put into collectives whose name contains one of these, or into all."""
        return sum(size for name, size in self.sent if not names or any(part in name for part in names))
