"""The cells of nn.LSTM and nn.GRU that torch has for GPUs alone, written with the CPU's operators.

Each forward returns what its backward needs: the gates after their functions.
"""

from __future__ import annotations

from typing import Any

import torch

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
