"""Plain models for tests without a Trainer, all that can be seen of them before and after, and trained adapters
in the forms in which they are handed on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora import LoRAConfig, adapter_state_dict, inject, save_adapter
from lightning_lora.adapter.fingerprint import Entry
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint as write
from lightning_lora.exchange.take import fingerprint_of
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.live_state import open_state

LENGTH = 5


class OwnLinear(nn.Linear):
    """A user's subclass."""


class Zoo(nn.Module):
    """Every kind of state: embedding, convolution, a user's linear, normalisation with and without buffers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(OwnLinear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        result: torch.Tensor = self.head(self.body(self.norm(x).mean(1)))
        return result


class Stubborn(nn.Module):
    """Two good layers before one that cannot be adapted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.zoo = Zoo()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
        self.last = layer


ZOO_LAYERS = ["embed", "conv", "body.0", "body.3"]


def zoo_config(**options: Any) -> LoRAConfig:
    """Adapts all of Zoo but the head, which is trained whole, and the biases of adapted layers."""
    defaults: dict[str, Any] = {"r": 2, "target_modules": ZOO_LAYERS, "modules_to_save": ["head"], "bias": "lora_only"}
    return LoRAConfig(**defaults | options)


def tokens(seed: int = 7) -> torch.Tensor:
    return torch.randint(11, (6, LENGTH), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 3) -> None:
    """A few steps on all that is trainable, so that everything that can change does."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def randomise_(model: nn.Module, scale: float = 0.1) -> None:
    """Fill the factors, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def trace(model: nn.Module) -> dict[str, Any]:
    """All that injection could leave behind: classes, attributes, hooks, names, identity, memory, flags, values."""
    return {
        "modules": [(name, id(module), type(module), _attributes(module)) for name, module in model.named_modules()],
        "parameters": [(name, p.requires_grad, _memory(p)) for name, p in model.named_parameters()],
        "buffers": [(name, _memory(buffer)) for name, buffer in model.named_buffers()],
        "state": list(model.state_dict()),
    }


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (id(tensor),) if is_lazy(tensor) else (id(tensor), tensor.data_ptr(), tensor.dtype, bits(tensor))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


# --- a trained model, and the forms in which its adapter is handed on ---


def base_zoo() -> Zoo:
    torch.manual_seed(1)
    return Zoo().eval()


def trained_zoo(**options: Any) -> Zoo:
    model = base_zoo()
    inject(model, zoo_config(**options))
    train(model)
    return model.eval()


def two_layers(seed: int = 2, **options: Any) -> nn.Sequential:
    """Two linear layers with an adapter that has an effect, and differs by seed."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inject(model, LoRAConfig(**{"r": 2, "init_lora_weights": False} | options), seed=seed)
    return model


def checkpoint(model: nn.Module, kind: Any) -> dict[str, Any]:
    """What Lightning would write; "bare" and "state" are what a user would by hand."""
    if kind == "bare":
        return adapter_state_dict(model)
    if kind == "state":
        return {"state_dict": adapter_state_dict(model), "epoch": 3}
    found = {"state_dict": model.state_dict(), "epoch": 3}
    write(model, found, kind)
    return found


def source(model: nn.Module, kind: str, form: str, path: Path) -> Any:
    if form == "folder":
        save_adapter(model, path / "adapter")
        return path / "adapter"
    if form == "file":
        torch.save(checkpoint(model, kind), path / "file.ckpt")
        return str(path / "file.ckpt")
    return checkpoint(model, kind)


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


def fingerprint(model: nn.Module) -> dict[str, Entry]:
    """The entries of the fingerprint of an injected model's base, as they are now."""
    return fingerprint_of(open_state(open_model(model, "test")))
