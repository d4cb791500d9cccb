"""The work that every candidate does: a 4-layer pre-norm transformer stack with LoRA on all linear layers."""

from __future__ import annotations

from collections.abc import Callable

import loralib
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, inject

R, ALPHA = 8, 16
TARGETS = ["q", "k", "v", "o", "up", "down"]


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads = max(1, d // 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        batch, length, d = y.shape
        q, k, v = (layer(y).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stack(d: int, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(d) for _ in range(4)]).to(device, dtype)


def ours(model: nn.Module, dropout: float = 0.0, targets: list[str] = TARGETS) -> nn.Module:
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets))
    return model


def peft_model(model: nn.Module, dropout: float = 0.0, targets: list[str] = TARGETS, wide: bool = True) -> PeftModel:
    """As PEFT's users make it; its adapters are float32 by default, as ours are."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets)
    return get_peft_model(model, config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]


def peft(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """The network inside, so that the outer wrapper's calls do not count."""
    return peft_model(model, dropout).base_model.model


def narrow_peft(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """With autocast_adapter_dtype=False: 16-bit adapters in a 16-bit model."""
    return peft_model(model, dropout, wide=False).base_model.model


def lora_lib(model: nn.Module, dropout: float = 0.0, targets: list[str] = TARGETS) -> nn.Module:
    """loralib, whose classes replace nn.Linear one by one."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if name in targets and isinstance(layer, nn.Linear):
                new = loralib.Linear(
                    layer.in_features,
                    layer.out_features,
                    r=R,
                    lora_alpha=ALPHA,
                    lora_dropout=dropout,
                    bias=layer.bias is not None,
                )
                new.to(layer.weight.device, layer.weight.dtype)
                new.weight, new.bias = layer.weight, layer.bias
                setattr(module, name, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


def floor(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """The frozen network: forward, and backward with respect to the input only."""
    return model.requires_grad_(False)


CANDIDATES: dict[str, Callable[..., nn.Module]] = {"ours": ours, "peft": peft, "loralib": lora_lib, "floor": floor}


def step(model: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward, without an optimizer."""
    model(x.detach().requires_grad_()).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def fill(model: nn.Module, share: float = 0.01) -> None:
    """Random B in every adapted layer, scaled so that s * B @ A has that share of W's norm."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            default = not isinstance(module.lora_A, nn.Parameter)
            a = module.lora_A["default"].weight if default else module.lora_A
            b = module.lora_B["default"].weight if default else module.lora_B
            torch.manual_seed(1)
            a.data.normal_(std=0.1)
            b.data.normal_()
            size = (b.detach().double() @ a.detach().double()).norm() * ALPHA / R
            b.data.mul_(share * float(module.weight.detach().double().norm() / size))
