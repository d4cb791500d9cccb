"""What a layer may do with a tensor: not all tensors can be written to, or be asked for their values."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a transform of torch.func runs now, such as vmap, grad or jvp, or forward-mode derivatives.

    Under vmap no decision can depend on values, and a tensor may stand for many.

    Example::

        >>> torch.vmap(lambda x: x + is_transformed())(torch.zeros(2))
        tensor([1., 1.])
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_tracing() -> bool:
    """Return whether torch.jit.trace records a graph, which keeps sizes that operators get as plain numbers."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call, attr-defined]


def runs_as_written() -> bool:
    """Return whether neither a transform nor a trace sees what runs. Each layer asks at each forward."""
    return not (is_transformed() or is_tracing())


def may_write(result: torch.Tensor) -> bool:
    """Return whether an operation may write into a result that nothing else uses.

    Under vmap the result may be the same for all, and what is written differ. TorchScript may run a recorded graph with
    views in other places. Nested tensors have few operators.
    """
    return runs_as_written() and not result.is_nested


def lies_in_rows(x: torch.Tensor) -> bool:
    """Return whether x has two dimensions or more, and its memory can be viewed as rows: it is dense and contiguous."""
    return x.layout is torch.strided and not x.is_nested and x.dim() > 1 and x.is_contiguous()
