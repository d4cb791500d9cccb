"""What autocast casts on a GPU, for a device in Python: torch's lists are for its own devices alone.

torch keeps the casts of parameters until the outermost autocast ends. Here each use casts anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

LOWER = (  # runs in the lower precision
    *("linear", "matmul", "mm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "bmm", "einsum", "prelu"),
    *("conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell"),
)
FLOAT32 = (
    *("softmax", "log_softmax", "layer_norm", "native_layer_norm", "group_norm", "norm", "exp", "log", "pow", "cumsum"),
    *("nll_loss", "nll_loss_nd", "mse_loss", "l1_loss", "cross_entropy_loss", "binary_cross_entropy_with_logits"),
)
WIDEST = ("addcdiv", "addcmul", "atan2", "cat", "stack", "dot", "index_put", "scatter_add", "tensordot")
KEY = "AutocastPrivateUse1"


def register_casts(library: Any, device: str) -> list[Any]:
    """Register the casts, and return what holds them."""
    others: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    others.fallback(torch.library.fallthrough_kernel, KEY)
    for names, kind in ((LOWER, "lower"), (FLOAT32, "float32"), (WIDEST, "widest")):
        for name in names:
            overloads = getattr(torch.ops.aten, name)
            for overload in overloads.overloads():
                if "out" not in overload and "dimname" not in overload:
                    library.impl(
                        getattr(overloads, overload), _casting(getattr(overloads, overload), kind, device), KEY
                    )
    return [others]


def _casting(operator: Any, kind: str, device: str) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        cast = [tensor for tensor in given if tensor.is_floating_point() and tensor.device.type == device]
        dtype = torch.get_autocast_dtype(device) if kind == "lower" else torch.float32
        if kind == "widest" and not any(tensor.dtype == torch.float32 for tensor in cast):
            dtype = None  # type: ignore[assignment]
        ids = {id(tensor) for tensor in cast if tensor.dtype != torch.float64}

        def to_dtype(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if dtype is not None and id(tensor) in ids else tensor

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*pytree.tree_map_only(torch.Tensor, to_dtype, args), **kwargs)

    return run
