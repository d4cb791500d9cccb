"""Run steps on all ranks so that a failure on one rank raises on all of them.

If one rank raised alone, the others would wait for ever in their next collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import LoRAError, NonFiniteError, sentence
from .flat import flat_shard, is_flat
from .sharding import holds_shards, is_sharded, reduce_

T = TypeVar("T")


def writes_files(modules: Iterable[nn.Module]) -> bool:
    """Return whether this rank writes files. For a sharded model only rank 0 does, for other models every rank.

    Args:
        modules: all modules of the model.
    """
    return not any(map(holds_shards, modules)) or dist.get_rank() == 0


class RankSync:
    """Runs steps on every rank and keeps the first failure. raise_on_any_rank then raises it on all ranks."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Find the ranks over which these tensors are sharded."""
        tensors = list(tensors)
        self.meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor)))
        shards = [flat_shard(tensor) for tensor in tensors if is_flat(tensor)]
        self.groups = list(dict.fromkeys((shard.group, shard.device) for shard in shards))  # of flat tensors
        self.names: list[str] = []
        self.failed: tuple[int, Exception] | None = None  # number and error of this rank's first failed step

    def run(self, name: str, step: Callable[..., T] | None, *args: Any) -> T | None:
        """Run a step, unless an earlier step failed on this rank, and return what it returns.

        The step must not communicate. Where it does, the caller finishes that after a step that failed or was not run.

        Args:
            name: name of the step for messages, the same on all ranks.
            step: the function, or None on ranks that have nothing to do.
            args: arguments of the function.
        """
        number = len(self.names)
        self.names.append(name)
        if step is not None and self.failed is None:
            try:
                return step(*args)
            except Exception as error:
                self.failed = self.failed or (number, error)  # a step inside this one may have failed first
        return None

    def share(self, tensor: torch.Tensor) -> float:
        """Return 1 / (number of ranks that hold the same shard). Weight values of the shard with it before `total`."""
        holders = 1
        for mesh in self.meshes:
            on_mesh = is_sharded(tensor) and tensor.device_mesh == mesh
            dims = [dim for dim in range(mesh.ndim) if not on_mesh or cast(Any, tensor).placements[dim].is_replicate()]
            holders *= math.prod(mesh.size(dim) for dim in dims)
        own = flat_shard(tensor).group if is_flat(tensor) else self
        holders *= math.prod(dist.get_world_size(group) for group, _ in self.groups if group is not own)
        return 1 / holders

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return sums of values over the ranks. Values that several ranks hold must be weighted by `share`.

        Collective.
        """
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: torch.Tensor, op: Any) -> torch.Tensor:
        for mesh in self.meshes:
            values = values.to(mesh.device_type)
            reduce_(values, mesh, range(mesh.ndim), op)
        # Of a failure all must know: FSDP1's HYBRID_SHARD has several groups with the same slices.
        everyone = dict.fromkeys((None, device) for _, device in self.groups)
        for group, device in self.groups if op == dist.ReduceOp.SUM else everyone:
            values = values.to(device)
            dist.all_reduce(values, op, group=group)
        return values

    def raise_on_any_rank(self) -> None:
        """Raise an error on all ranks if a step failed on any rank. Collective: exchanges one integer.

        Raises:
            NonFiniteError: all failures on all ranks are of this kind.
            Exception: the first failure of this rank.
            LoRAError: only other ranks failed.
        """
        count = len(self.names)  # the same on all ranks, so a number means the same step everywhere
        first = int(self._reduced(torch.tensor(self._severity()), dist.ReduceOp.MIN))
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

    def _severity(self) -> int:
        """Return a number for this rank's failure. All ranks raise the failure with the smallest number.

        From 0 to count - 1 it is the number of the failed step. If the step failed because values are not finite, count
        is added. 2 * count means that nothing failed.
        """
        count = len(self.names)
        if self.failed is None:
            return 2 * count
        index, error = self.failed
        return count + index if isinstance(error, NonFiniteError) else index
