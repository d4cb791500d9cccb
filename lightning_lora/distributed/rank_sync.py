"""Steps that all ranks take alike: where one fails on one rank, all raise, and none waits for ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import LoRAError
from .sharding import has_sharded, is_sharded, reduce_


def writes_files(model: nn.Module) -> bool:
    """Whether this rank is the one to write what all gathered; any rank of a model that is not sharded is."""
    return not has_sharded(model) or dist.get_rank() == 0


class RankSync:
    """Steps that every rank takes alike; where one fails on one rank, all raise.

    A rank that raised alone would leave the others waiting in their next collective.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.meshes = list(dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t)))
        self.names: list[str] = []
        self.failed: tuple[int, Exception] | None = None

    def run(self, name: str, step: Callable[[], object] | None) -> None:
        """Take a step without collectives, unless an earlier one failed; None where it is for other ranks."""
        self.names.append(name)
        if step is not None and self.failed is None:
            try:
                step()
            except Exception as error:
                self.failed = (len(self.names), error)

    def share(self, tensor: torch.Tensor) -> float:
        """Return what this rank's shard counts in a total, in which each rank adds what it holds, replicas too."""
        holders = 1
        for mesh in self.meshes:
            on_mesh = is_sharded(tensor) and tensor.device_mesh == mesh
            dims = [dim for dim in range(mesh.ndim) if not on_mesh or cast(Any, tensor).placements[dim].is_replicate()]
            holders *= math.prod(mesh.size(dim) for dim in dims)
        return 1 / holders

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return sums over the ranks; see share for what several of them hold. Collective."""
        for mesh in self.meshes:
            values = values.to(mesh.device_type)
            reduce_(values, mesh, range(mesh.ndim), dist.ReduceOp.SUM)
        return values

    def raise_on_any_rank(self) -> None:
        """Raise if a step failed on any rank. Collective: one integer."""
        nowhere = len(self.names) + 1
        first = -self.failed[0] if self.failed else -nowhere
        for mesh in self.meshes:
            flag = torch.tensor(first, device=mesh.device_type)
            reduce_(flag, mesh, range(mesh.ndim), dist.ReduceOp.MAX)
            first = int(flag)
        if self.failed is not None:
            place, error = self.failed
            if isinstance(error, LoRAError):
                raise LoRAError(f"{self.names[place - 1]}: {error}") from error
            raise error
        if -first < nowhere:
            raise LoRAError(f"{self.names[-first - 1]}: this failed on another rank, whose message says why")
