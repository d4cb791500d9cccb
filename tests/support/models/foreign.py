"""Linear layers written like those of other libraries: GPTQ's, AWQ's, HQQ's and Transformer Engine's."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

INPUTS, WIDTH = 16, 24


class QuantLinear(nn.Module):
    """GPTQ: 4-bit values packed along the inputs into int32 buffers, with scales and zeros of groups, bias a buffer."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, group: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        grouped = linear.weight.detach().float().T.reshape(-1, group, self.out_features)  # (groups, group, out)
        low, high = grouped.amin(1), grouped.amax(1)
        scales = (high - low).clamp(min=1e-6) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        values = (grouped / scales[:, None] + zeros[:, None]).round().clamp(0, 15).to(torch.int32)
        values = values.reshape(-1, 8, self.out_features)
        packed = torch.zeros_like(values[:, 0])
        for position in range(8):
            packed |= values[:, position] << (4 * position)
        self.register_buffer("qweight", packed)
        self.register_buffer("qzeros", zeros.to(torch.int32))
        self.register_buffer("scales", scales.to(torch.float16))
        self.register_buffer("g_idx", torch.arange(self.in_features, dtype=torch.int32) // group)
        self.register_buffer("bias", linear.bias.detach().to(torch.float16) if linear.bias is not None else None)

    def values(self) -> torch.Tensor:
        """W as (out, in)."""
        shifts = 4 * torch.arange(8, device=self.qweight.device)[None, :, None]
        values = ((self.qweight[:, None] >> shifts) & 15).reshape(self.in_features, self.out_features)
        index = self.g_idx.long()
        return ((values - self.qzeros[index]).float() * self.scales[index].float()).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.values().to(x.dtype), bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ ctx.saved_tensors[0], None, None


class WQLinear(QuantLinear):
    """AWQ: packed buffers too, half precision inside, and a backward in training mode alone, as AutoAWQ's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, bias = x.to(torch.float16), self.bias
        product: Any = _Product.apply
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            y: torch.Tensor = product(half, self.values().half(), bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class HQQLinear(nn.Module):
    """HQQ: bytes in a parameter, scales, zeros and bias in no tensor of the module, and entries of its own making."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale = (high - low) / 255
        self.W_q = nn.Parameter(((weight - low) / scale).round().to(torch.uint8), requires_grad=False)
        self.meta, self.bias = {"scale": scale, "zero": low}, linear.bias.detach()

    def values(self) -> torch.Tensor:
        return self.W_q.float() * self.meta["scale"] + self.meta["zero"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.values().to(x.dtype), self.bias.to(x.dtype))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = {"W_q": self.W_q.detach(), "bias": self.bias, **self.meta}
        if "destination" in kwargs and "prefix" in kwargs:
            kwargs["destination"].update({kwargs["prefix"] + name: value for name, value in state.items()})
        return state

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, *found: Any) -> None:
        given = {name: state.pop(prefix + name) for name in ("W_q", "bias", *self.meta) if prefix + name in state}
        found[0].extend(prefix + name for name in ("W_q", *self.meta) if name not in given)
        self.W_q.data, self.bias = given.get("W_q", self.W_q.data), given.get("bias", self.bias)
        self.meta = {name: given.get(name, value) for name, value in self.meta.items()}


class OtherLinear(nn.Module):
    """The simplest one: weight and bias are parameters."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(0.1 * torch.randn(out_features, in_features))
        self.bias = nn.Parameter(0.1 * torch.randn(out_features)) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, **options: Any) -> Any:
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        made.weight, made.bias = cast(nn.Parameter, linear.weight), cast("nn.Parameter | None", linear.bias)
        return made

    def values(self) -> torch.Tensor:
        return self.weight.detach()

    def forward(self, inp: torch.Tensor) -> Any:
        return F.linear(inp, self.weight, self.bias)


class TELinear(OtherLinear):
    """Transformer Engine: it has extra state, None or a tensor, and gives its bias too on request."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, return_bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.return_bias, self.history = return_bias, cast("torch.Tensor | None", None)

    def get_extra_state(self) -> torch.Tensor | None:
        return self.history

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.history = state

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        if self.training:
            largest = inp.detach().abs().max().reshape(1).float()
            self.history = largest if self.history is None else torch.maximum(self.history, largest)
        return (F.linear(inp, self.weight), self.bias) if self.return_bias else super().forward(inp)


FOREIGN: dict[str, Any] = {"GPTQ": QuantLinear, "AWQ": WQLinear, "HQQ": HQQLinear, "TE": TELinear.of}


def network(kind: str = "GPTQ", seed: int = 1) -> nn.Sequential:
    """Two foreign layers, of which "2" is meant to be adapted, around a norm, and a plain layer."""
    torch.manual_seed(seed)
    make = FOREIGN[kind]
    return nn.Sequential(
        make(nn.Linear(INPUTS, WIDTH)),
        nn.LayerNorm(WIDTH),
        make(nn.Linear(WIDTH, WIDTH)),
        nn.ReLU(),
        nn.Linear(WIDTH, 3),
    )


def inputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(3)).to(dtype)
