"""A network of three small layers with an adapter in a folder, for tests of files and of the command."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter

WIDTH = 4
TENSORS = "adapter_model.safetensors"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))


def small() -> Small:
    torch.manual_seed(1)
    return Small()


def write_small_adapter(path: Path) -> Path:
    """Write an adapter of two adapted layers and one that was trained whole, and beside it its base in two forms."""
    net = small()
    torch.save(dict(net.state_dict()), path / "base.pt")
    save_file(dict(net.state_dict()), path / "base.safetensors")
    inject(net, LoRAConfig(r=2, target_modules=["one", "two"], modules_to_save=["three"], init_lora_weights=False))
    with torch.no_grad():
        net.three.weight.add_(1)
    save_adapter(net, path / "adapter")
    return path / "adapter"


def merging(path: Path, source: Path, base: str = "base.pt", *flags: str) -> list[object]:
    """The arguments of the command that merge an adapter into the base, for files in a folder."""
    output = (path / "out").with_suffix(base[4:])
    return ["merge", "--base", path / base, "--adapter", source, "--output", output, *flags]
