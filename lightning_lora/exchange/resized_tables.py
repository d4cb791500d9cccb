"""Tables of embeddings that were resized, on one side or on both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import is_spread
from ..errors import LoRAError


def has_new_rows(name: str, stored: torch.Tensor, live: torch.Tensor) -> bool:
    """Tell whether a stored table equals the model's except for its last rows, and those are less than half.

    Raises:
        LoRAError: the two have different numbers of rows: one of them was resized.
    """
    if not is_spread(live):
        refuse_other_rows(name, stored.shape, unsharded_shape(live))
    if stored.shape != unsharded_shape(live) or not stored.dim() or is_spread(live) or live.is_meta:
        return False  # the fingerprint is compared instead
    if not (stored.is_floating_point() and live.is_floating_point()):
        return False  # a quantized weight
    relative = max(1e-5, *(torch.finfo(tensor.dtype).eps for tensor in (stored, live)))
    rows = torch.isclose(stored.float(), live.float().cpu(), rtol=relative).reshape(len(stored), -1).all(1)
    same = int(rows.long().cumprod(0).sum())
    return len(rows) / 2 <= same < len(rows)


def refuse_other_rows(name: str, stored: Sequence[int], live: Sequence[int]) -> None:
    """Raise LoRAError where the shapes of a stored table and the model's differ in the number of rows alone."""
    if len(stored) and len(live) and list(stored[1:]) == list(live[1:]) and stored[0] != live[0]:
        raise LoRAError(
            f"adapter: {name!r} has {stored[0]} rows, in the model {live[0]}: one of the two was resized. Resize "
            f"the model first: model.resize_token_embeddings({stored[0]})."
        )
