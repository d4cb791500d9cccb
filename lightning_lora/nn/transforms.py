"""When a layer's formula must run as it is written: not all tensors can be written to, or be asked for their sizes."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from ..distributed.sharding import is_sharded


def runs_by_formula(x: torch.Tensor) -> bool:
    """Return whether y = base(x) + s * B(A(x)) must run by plain operators, which write into no tensor.

    - A transform of torch.func runs (vmap, grad, jvp), or forward-mode derivatives. Under vmap a tensor may stand for
      many, and the base's output may be the same for all of them.
    - torch.jit.trace records a graph, which keeps sizes that operators get as plain numbers.
    - x is nested, sparse or a DTensor, which have few operators.

    Example::

        >>> x = torch.zeros(2, 3)
        >>> runs_by_formula(x), runs_by_formula(x.to_sparse())
        (False, True)
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_tracing()
        or x.is_nested
        or x.layout is not torch.strided
        or is_sharded(x)
    )


def is_tracing() -> bool:
    """Return whether torch.jit.trace records a graph."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call, attr-defined]
