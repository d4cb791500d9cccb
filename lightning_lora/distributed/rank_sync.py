"""Steps that all ranks take alike: where one fails on one rank, all raise, and none waits for ever in a collective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import LoRAError, NonFiniteError, sentence
from .sharding import holds_shards, is_sharded, reduce_


def writes_files(modules: Iterable[nn.Module]) -> bool:
    """Return whether this rank is the one that writes files: rank 0 of a sharded model, every rank of another.

    `modules` are all of the model's.
    """
    return not any(map(holds_shards, modules)) or dist.get_rank() == 0


class RankSync:
    """Runs steps on every rank; where one fails on one rank, raise_on_any_rank raises on all of them.

    A rank that raised alone would leave the others waiting in their next collective.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take the ranks over which the tensors are sharded."""
        self.meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor)))
        self.names: list[str] = []
        self.failed: tuple[int, Exception] | None = None  # the first step that failed on this rank, and how

    def run(self, name: str, step: Callable[..., object] | None, *args: Any) -> None:
        """Call a step without collectives, unless an earlier one failed; None where it is for other ranks."""
        self.names.append(name)
        if step is not None and self.failed is None:
            try:
                step(*args)
            except Exception as error:
                self.failed = (len(self.names) - 1, error)

    def share(self, tensor: torch.Tensor) -> float:
        """Return the weight of this rank's shard in `total`, 1 / (the number of ranks that hold the same)."""
        holders = 1
        for mesh in self.meshes:
            on_mesh = is_sharded(tensor) and tensor.device_mesh == mesh
            dims = [dim for dim in range(mesh.ndim) if not on_mesh or cast(Any, tensor).placements[dim].is_replicate()]
            holders *= math.prod(mesh.size(dim) for dim in dims)
        return 1 / holders

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return sums over the ranks; weigh what several of them hold by `share`. Collective."""
        for mesh in self.meshes:
            values = values.to(mesh.device_type)
            reduce_(values, mesh, range(mesh.ndim), dist.ReduceOp.SUM)
        return values

    def raise_on_any_rank(self) -> None:
        """Raise if a step failed on any rank, the same kind of error on all. Collective: one integer.

        Raises:
            NonFiniteError: that is all that failed, on any rank.
            Exception: the first failure on this rank; LoRAError where only others failed.
        """
        count = len(self.names)
        first = self._rank_of_failure()
        for mesh in self.meshes:
            flag = torch.tensor(first, device=mesh.device_type)
            reduce_(flag, mesh, range(mesh.ndim), dist.ReduceOp.MIN)
            first = int(flag)
        if first == 2 * count:
            return
        kind = LoRAError if first < count else NonFiniteError
        index, error = self.failed or (first % count, None)
        if error is None or (kind is LoRAError and isinstance(error, NonFiniteError)):
            raise kind(f"{self.names[first % count]}: this failed on another rank, whose message says why.") from error
        if isinstance(error, LoRAError):
            name = self.names[index]
            raise kind(f"{name}: {sentence(error).removeprefix(f'{name}: ')}") from error
        raise error

    def _rank_of_failure(self) -> int:
        """Return the failed step's number; a value that is not finite comes after all other failures, success last."""
        count = len(self.names)
        if self.failed is None:
            return 2 * count
        index, error = self.failed
        return count + index if isinstance(error, NonFiniteError) else index
