"""What rounding W' costs: the share of the adapter's norm that is lost, logged in one line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from ..distributed.rank_sync import RankSync
from ..notices import tell
from .adapted_weights import AdaptedWeights

WORST = 0.05  # a larger share is a warning
# The remedy where rounding a file of merged weights costs much.
IN_FILES = "Merge into a float32 base, or keep the adapter apart from the base (save_adapter)."


class Rounding:
    """Sums over layers, each as merge_weight_ counts them, and over the ranks that hold parts of a layer.

    Args:
        sync: of the layers.
        again: also count layers whose cost was logged before.
    """

    def __init__(self, sync: RankSync, *, again: bool = False) -> None:
        self.sync, self.again = sync, again
        self.shares: dict[AdaptedWeights, float] = {}
        self.costs: dict[AdaptedWeights, list[float]] = {}

    def of(self, layer: AdaptedWeights, weight: torch.Tensor) -> list[float] | None:
        """Return the two sums of a layer, to be passed to merge_weight_ as `cost`. `weight` may be sharded."""
        if layer.lora.rounding_reported and not self.again:
            return None
        self.shares[layer] = self.sync.share(weight)
        return self.costs.setdefault(layer, [0.0, 0.0])

    def tell(self, what: str, remedy: str, stacklevel: int) -> None:
        """Log what was lost, as tell_rounding does. Collective, unless no layer was counted on any rank."""
        if not self.costs:
            return
        sums = [sum(self.shares[layer] * cost[i] for layer, cost in self.costs.items()) for i in (0, 1)]
        total = self.sync.total(torch.tensor(sums, dtype=torch.float64))
        for layer in self.costs if total[1] > 0 else ():
            layer.lora.rounding_reported = True
        tell_rounding(what, total.tolist(), remedy, stacklevel + 1)


def tell_rounding(what: str, cost: Sequence[float], remedy: str, stacklevel: int) -> None:
    """Log the share of the adapter that rounding loses; warn where it is large. Nothing where it shows as 0.0%.

    Args:
        what: was rounded, the beginning of the line.
        cost: the squared norms of what rounding changed and of what the adapter changed.
        remedy: the end of the warning; without one it is no warning.
        stacklevel: of the warning, seen from the caller.
    """
    error, change = cost
    lost = math.sqrt(error / change) if change > 0 else 0.0  # every B is zero at first
    if (share := f"{lost:.1%}") == "0.0%":
        return
    line = f"lightning_lora: {what}: rounding costs {share} of the adapter's norm"
    if lost > WORST and remedy:
        warnings.warn(f"{line}. {remedy}", stacklevel=stacklevel + 1)
    else:
        tell(line)
