"""Adapters of PEFT's other methods, by peft and by us, on a small model with layers of several kinds and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject

SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Small(nn.Module):
    """Linear layers of three sizes, transformers' Conv1D, an embedding, convolutions of two dimensions and a group."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.one, self.two = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 7, bias=False)
        self.third = Conv1D(8, 7)  # type: ignore[no-untyped-call]
        self.conv, self.grouped = nn.Conv1d(8, 6, 3, padding=1), nn.Conv1d(6, 4, 3, groups=2, padding=1)
        self.image, self.point, self.volume = nn.Conv2d(1, 3, (3, 2)), nn.Conv2d(3, 4, 1), nn.Conv3d(1, 1, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.third(self.two(self.one(self.emb(tokens)).tanh()).tanh()).tanh()  # (n, length, 8)
        x = self.grouped(self.conv(x.transpose(1, 2)).tanh()).tanh()  # (n, 4, length)
        x = self.point(self.image(x[:, None]).tanh()).tanh().mean((2, 3))
        result: torch.Tensor = self.head(self.volume(x[:, None, None, None])[:, 0, 0, 0])
        return result


def base() -> Small:
    """Always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Small()
        nn.init.normal_(model.third.weight, std=0.4)
        return model.eval()


TOKENS = torch.arange(14).remainder(11).view(2, 7)


@dataclass(frozen=True)
class Method:
    """One of PEFT's methods.

    Attributes:
        config: peft's class of options.
        ours: of LoRAConfig.
        theirs: of peft's class; both mean the same adapter.
        leaves: PEFT's names of what a layer trains, each with ours.
        layers: the names of the layers that are adapted.
        reference: W' of a layer in float64, from the definition, given the model and the layer's name.
        folders: options of peft's class, each with what is in LoRAConfig then.
        written: what PEFT's folder says the same, written by us or by peft.
    """

    config: type
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    leaves: Mapping[str, str]
    layers: Sequence[str]
    reference: Callable[..., torch.Tensor]
    folders: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
    written: Sequence[str]


LOHA_LAYERS = ["one", "two", "conv", "grouped", "image", "point"]

LOHA_LEAVES = {leaf: f"lora_{leaf}" for leaf in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}

LOHA_FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # peft's options, and what LoRAConfig is then
    "plain": ({}, {}),
    "patterns": (
        {"rank_pattern": {"two": 3}, "alpha_pattern": {"conv": 5}},
        {"rank_pattern": {"two": 3}, "alpha_pattern": {"conv": 5}},
    ),
    "random start": ({"init_weights": False}, {"init_lora_weights": False}),
    "modules_to_save": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
    "an expression": ({"target_modules": "one|conv"}, {"target_modules": "one|conv"}),
}


def loha_reference(model: Any, name: str, scaling: float = 1.5) -> torch.Tensor:
    """W' of a layer in float64, from the definition."""
    layer = model.get_submodule(name)
    w1a, w1b, w2a, w2b = (getattr(layer, leaf).detach().double() for leaf in LOHA_LEAVES.values())
    weight = layer.weight.detach().double()
    merged: torch.Tensor = weight + scaling * ((w1a @ w1b) * (w2a @ w2b)).view(weight.shape)
    return merged


LOHA = Method(
    peft.LoHaConfig,
    {"variant": "loha", "r": 2, "lora_alpha": 3, "target_modules": LOHA_LAYERS},
    {"r": 2, "alpha": 3, "target_modules": LOHA_LAYERS},
    LOHA_LEAVES,
    LOHA_LAYERS,
    loha_reference,
    LOHA_FOLDERS,
    ("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "init_weights", "use_effective_conv2d"),
)

METHODS = {"loha": LOHA}


def ours(method: Method, model: Any = None, **options: Any) -> Any:
    """The model with our adapter."""
    model = base() if model is None else model
    inject(model, LoRAConfig(**{**method.ours, **options}))
    return model


def theirs(method: Method, model: Any = None, **options: Any) -> peft.PeftModel:
    """The model with peft's adapter, in evaluation mode."""
    model = base() if model is None else model
    adapted: peft.PeftModel = peft.get_peft_model(model, method.config(**{**method.theirs, **options}))
    adapted.eval()
    return adapted


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def moved(model: Any, seed: int = 2) -> Any:
    """The model with all that it trains moved away from where it starts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def pairs(method: Method, model: nn.Module, other: peft.PeftModel) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """What our model trains in adapted layers, beside what peft's trains there."""
    found = []
    for name, parameter in other.get_submodule("base_model.model").named_parameters():
        for leaf, own in method.leaves.items():
            if f".{leaf}.default" in name:
                layer = name.partition(f".{leaf}.")[0]
                found.append((f"{layer}.{own}", model.get_parameter(f"{layer}.{own}"), parameter))
    return found


def copy_to_peft(method: Method, model: nn.Module, other: peft.PeftModel) -> None:
    with torch.no_grad():
        for _, parameter, theirs in pairs(method, model, other):
            theirs.copy_(parameter)


def steps(model: nn.Module, count: int) -> list[float]:
    """The losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(count):
        loss = (model(TOKENS) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
