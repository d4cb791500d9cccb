"""Operators for the pretended device: what autocast casts on a GPU, and the cells of nn.LSTM and nn.GRU."""

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


Optional = torch.Tensor | None


def _with_biases(inputs: Any, hidden: Any, b_ih: Optional, b_hh: Optional) -> tuple[Any, Any]:
    return (inputs if b_ih is None else inputs + b_ih), (hidden if b_hh is None else hidden + b_hh)


def lstm(
    inputs: torch.Tensor, hidden: torch.Tensor, cx: torch.Tensor, b_ih: Optional = None, b_hh: Optional = None
) -> Any:
    """Return h, c and the gates."""
    i, f, g, o = sum(_with_biases(inputs, hidden, b_ih, b_hh)).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def lstm_backward(
    grad_hy: Optional, grad_cy: Optional, cx: torch.Tensor, cy: torch.Tensor, workspace: torch.Tensor, has_bias: bool
) -> Any:
    """Return the gradients of the gates, of c and of the biases."""
    i, f, g, o = workspace.chunk(4, 1)
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = grad_hy * o * (1 - cy.tanh() ** 2) + (0 if grad_cy is None else grad_cy)
    gates = torch.cat(
        [
            grad_c * g * i * (1 - i),
            grad_c * cx * f * (1 - f),
            grad_c * i * (1 - g**2),
            grad_hy * cy.tanh() * o * (1 - o),
        ],
        1,
    )
    return gates, grad_c * f, gates.sum(0) if has_bias else None


def gru(
    inputs: torch.Tensor, hidden: torch.Tensor, hx: torch.Tensor, b_ih: Optional = None, b_hh: Optional = None
) -> Any:
    """Return h and what its backward needs."""
    given, kept = _with_biases(inputs, hidden, b_ih, b_hh)
    (r, z, n), (r_h, z_h, n_h) = given.chunk(3, 1), kept.chunk(3, 1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + r * n_h).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, n_h], 1)


def gru_backward(grad_hy: torch.Tensor, workspace: torch.Tensor, has_bias: bool) -> Any:
    """Return the gradients of both products, of h and of both biases."""
    r, z, n, hx, n_h = workspace.chunk(5, 1)
    grad_n = grad_hy * (1 - z) * (1 - n**2)
    grad_r, grad_z = grad_n * n_h * r * (1 - r), grad_hy * (hx - n) * z * (1 - z)
    inputs, hidden = torch.cat([grad_r, grad_z, grad_n], 1), torch.cat([grad_r, grad_z, grad_n * r], 1)
    biases = (inputs.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return inputs, hidden, grad_hy * z, *biases


CELLS = {
    "aten::_thnn_fused_lstm_cell": lstm,
    "aten::_thnn_fused_lstm_cell_backward_impl": lstm_backward,
    "aten::_thnn_fused_gru_cell": gru,
    "aten::_thnn_fused_gru_cell_backward": gru_backward,
}
