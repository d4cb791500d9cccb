"""The cost of a training step of an adapted linear layer: counted operations and kept bytes, no times."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, inject

ROWS, WIDTH, OUT, R = 96, 32, 64, 4


class Products(TorchDispatchMode):
    """Records the shapes of every matrix product, and the size of every other new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.shapes.append((tuple(left.shape), tuple(right.shape)))
        elif isinstance(result, torch.Tensor) and result.numel() >= ROWS * WIDTH and not is_view(result, args):
            self.others.append(str(func))
        return result


def is_view(result: torch.Tensor, args: tuple) -> bool:
    storages = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
    return result.untyped_storage()._cdata in storages


def step(layer: nn.Module, x: torch.Tensor) -> Products:
    x = x.detach().requires_grad_()
    with Products() as products:
        output = layer(x)
    gradient = torch.ones_like(output)
    with products:
        output.backward(gradient)
    return products


def test_the_thin_factor_is_on_the_left_of_every_product_over_the_rows_and_one_more_full_size_tensor_is_made():
    """On the CPU (out, rows) @ (rows, r) takes up to eight times as long as (r, rows) @ (rows, out)."""
    layer = nn.Sequential(nn.Linear(WIDTH, OUT))
    inject(layer, LoRAConfig(r=R))
    products = step(layer, torch.randn(ROWS, WIDTH))
    thin = [shapes for shapes in products.shapes if R in (*shapes[0], *shapes[1])]
    assert sorted(thin) == sorted(
        [
            ((R, WIDTH), (WIDTH, ROWS)),  # A x^T
            ((ROWS, R), (R, OUT)),  # added to the base's output
            ((R, OUT), (OUT, ROWS)),  # gradient of A x^T
            ((R, ROWS), (ROWS, OUT)),  # of B
            ((R, ROWS), (ROWS, WIDTH)),  # of A
            ((ROWS, R), (R, WIDTH)),  # of x
        ]
    )
    assert products.others == ["aten.add.Tensor"]
