"""A small model for each variant of LoRA, and what it computes: a few naive lines in float64, from the definitions."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, initialize_from_data, inject, lora_param_groups
from support.models.networks import bits
from support.models.quantized import packed_bits, quantize_, values_of

TOKENS, OUTPUTS = 11, 5
RATE, MOMENTUM = 0.1, 0.9
FROM_DATA = ("eva", "lora_ga")
Tensors = dict[str, torch.Tensor]


class Stack(nn.Module):
    """Two matrices as one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, width, width) / math.sqrt(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weights)


class Small(nn.Module):
    """A table, a stack of two matrices, three linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.stack = Stack(width)
        self.inner, self.other, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, OUTPUTS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.stack(self.embed(tokens)).tanh()
        result: torch.Tensor = self.head(self.other(self.inner(x).tanh()).tanh())
        return result


@dataclass(frozen=True)
class Variant:
    """Options of an adapter.

    Attributes:
        adapted: what has a product of factors, by the names in the model; a parameter under its own name.
        lr_ratio: of LoRA+.
        quantized: how the linear layers are quantized.
        swapped: options of the adapter that takes its place.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    adapted: tuple[str, ...] = ("inner", "head")
    lr_ratio: float = 1
    quantized: str = ""
    swapped: dict[str, Any] = field(default_factory=lambda: {"r": 4, "lora_alpha": 9})

    def all_options(self, **others: Any) -> dict[str, Any]:
        return {"r": 2, "lora_alpha": 3, "target_modules": ["inner", "head"]} | self.options | others


_PLACE = ["cpu"]


def place() -> str:
    """Return the device on which models and batches are."""
    return _PLACE[-1]


@contextmanager
def placed(device: str) -> Iterator[None]:
    """Put the models and batches that are made inside on another device; what is computed naively stays on the CPU."""
    _PLACE.append(device)
    try:
        yield
    finally:
        _PLACE.pop()


def batch(number: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens, each of them at least once in several batches, and what the model should answer."""
    return _batch(number, dtype, place())


@functools.cache
def _batch(number: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(number)
    tokens = torch.randperm(TOKENS, generator=stream).repeat(2)[:16].view(4, 4)
    return tokens.to(device), torch.randn(4, 4, OUTPUTS, generator=stream).to(device, dtype)


def loss_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 4 * F.mse_loss(model(data[0]), data[1])


def fresh(variant: Variant, dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    """Return the model without an adapter."""
    torch.manual_seed(seed)
    model = Small(64 if variant.quantized else 12).to(dtype)
    return quantize_(model, variant.quantized, device=place()) if variant.quantized else model.to(place())


def adapted(
    variant: Variant, dtype: torch.dtype = torch.float32, seed: int = 1, draw: int = 4, options: Any = None
) -> Any:
    """Return the model with an adapter that was not trained, drawn from `draw`."""
    model = fresh(variant, dtype, seed)
    config = LoRAConfig(**variant.all_options(**(options or {})))
    inject(model, config, seed=draw)
    if config.init_lora_weights in FROM_DATA:
        initialize_from_data(model, [batch(0, dtype)] * 2, loss_of)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def fill_(model: nn.Module, seed: int = 7) -> Any:
    """Move all that is trained away from where it starts."""
    stream = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=stream).to(parameter))
    return model


def filled(variant: Variant, *args: Any, **kwargs: Any) -> Any:
    return fill_(adapted(variant, *args, **kwargs))


def all_bits(model: nn.Module) -> dict[str, bytes]:
    """Return every byte of a model's parameters, and of what belongs to packed ones."""
    found = {name: bits(parameter.detach()) for name, parameter in model.named_parameters()}
    is_packed = not all(parameter.is_floating_point() for parameter in model.parameters())
    return found | ({"packed": b"".join(packed_bits(model))} if is_packed else {})


# --- what the model computes ---


class Naive:
    """The model in float64 on W' from the definitions; knows nothing of the package but the names of parameters."""

    def __init__(self, variant: Variant, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> None:
        self.options = variant.all_options(**options)
        self.variant = variant
        model = fresh(variant, dtype, seed)
        self.base = {name: value.detach().cpu().double() for name, value in model.named_parameters()}
        if variant.quantized:
            self.base |= {f"{name}.weight": values_of(getattr(model, name)) for name in ("inner", "other", "head")}
        self.shell = Small(self.base["embed.weight"].shape[1]).double()

    def scaling(self, name: str) -> float:
        """Return s: alpha / r, or alpha / sqrt(r) of rsLoRA, by the patterns' values."""
        r = (self.options.get("rank_pattern") or {}).get(name, self.options["r"])
        alpha = (self.options.get("alpha_pattern") or {}).get(name, self.options["lora_alpha"])
        return float(alpha / (math.sqrt(r) if self.options.get("use_rslora") else r))

    def weights(self, values: Tensors) -> Tensors:
        """Return every weight, W' in the place of W.

        Args:
            values: the adapter's tensors and base tensors that are trained, by their names in the model.
        """
        whole = self.base | {name: value for name, value in values.items() if name in self.base}
        for name in self.variant.adapted:
            weight = name if name in whole else f"{name}.weight"
            whole[weight] = self.adapted_weight(name, whole[weight], values)
        for table, ids in (self.options.get("trainable_token_indices") or {}).items():
            weight = whole[f"{table}.weight"]
            chosen = F.one_hot(torch.tensor(ids), len(weight)).double()
            whole[f"{table}.weight"] = weight * (1 - chosen.sum(0))[:, None] + chosen.T @ values[f"{table}.lora_rows"]
        return whole

    def adapted_weight(self, name: str, weight: torch.Tensor, values: Tensors) -> torch.Tensor:
        module, _, leaf = name.rpartition(".") if name in self.base else (name, "", "")
        if self.options.get("variant") in DELTAS:
            return weight + self.scaling(name) * DELTAS[self.options["variant"]](name, weight.shape, values)
        pattern = f"{module}.lora_{{}}_{leaf}".lstrip(".") if leaf else f"{module}.lora_{{}}"
        parts = (self.options.get("enable_lora") or {}).get(name)
        change = product(values[pattern.format("A")], values[pattern.format("B")], weight.shape, parts)
        if pattern.format("start_A") in values:
            first = (values[pattern.format(f"start_{factor}")] for factor in "AB")
            change = change - product(next(first), next(first), weight.shape, parts)
        changed = weight + self.scaling(name) * change
        if self.options.get("use_dora"):
            changed = changed * (values[pattern.format("magnitude")] / changed.detach().norm(dim=1))[:, None]
        return changed

    def run(self, values: Tensors, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = functional_call(self.shell, self.weights(values), (tokens.cpu(),))
        return result

    def loss(self, values: Tensors, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return 4 * (self.run(values, data[0]) - data[1].cpu().double()).square().mean()

    def rate(self, name: str) -> float:
        """Return the learning rate of a parameter: that of B is higher in LoRA+."""
        return RATE * (self.variant.lr_ratio if ".lora_B" in f".{name}" else 1)


def product(a: torch.Tensor, b: torch.Tensor, shape: torch.Size, parts: Iterable[bool] | None = None) -> torch.Tensor:
    """Return B @ A: of each matrix of a stack by itself, and of a fused projection for the parts that are adapted."""
    if len(shape) == 3:
        return torch.stack([b_e @ a_e for a_e, b_e in zip(a.chunk(shape[0]), b.chunk(shape[0]), strict=True)])
    if parts is None:
        return b @ a
    enabled = list(parts)
    pairs = iter(zip(a.chunk(sum(enabled)), b.chunk(sum(enabled)), strict=True))
    zeros = a.new_zeros(shape[0] // len(enabled), shape[1])
    products = [next(pairs) if on else None for on in enabled]
    return torch.cat([zeros if pair is None else pair[1] @ pair[0] for pair in products])


def loha_delta(name: str, shape: torch.Size, values: Tensors) -> torch.Tensor:
    """Return the elementwise product of two products of factors."""
    first_a, first_b, second_a, second_b = (
        values[f"{name}.lora_hada_{leaf}"] for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    return (first_a @ first_b) * (second_a @ second_b)


DELTAS = {"loha": loha_delta}  # without s


def wide(model: nn.Module) -> Tensors:
    """Return in float64 what training changes or the adapter holds, apart from the model; trained ones are leaves."""
    held = {name: p for name, p in model.named_parameters() if p.requires_grad or "lora_" in name}
    return {name: p.detach().cpu().double().requires_grad_(p.requires_grad) for name, p in held.items()}


# --- training ---


def optimizer_for(variant: Variant, model: nn.Module) -> torch.optim.SGD:
    groups: Any = list(trainable(model).values())
    if variant.lr_ratio != 1:
        groups = lora_param_groups(model, lr=RATE, lr_ratio=variant.lr_ratio)
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: Iterable[int]) -> None:
    """Train a step on each of these batches."""
    for number in numbers:
        optimizer.zero_grad()
        loss_of(model, batch(number, dtype_of(model))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def dtype_of(model: nn.Module) -> torch.dtype:
    dtype: torch.dtype = model.get_parameter("embed.weight").dtype
    return dtype


def naive_optimizer(naive: Naive, values: Mapping[str, torch.Tensor]) -> torch.optim.SGD:
    groups = [{"params": [value], "lr": naive.rate(name)} for name, value in values.items() if value.requires_grad]
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


def naive_train_(naive: Naive, values: Tensors, optimizer: torch.optim.Optimizer, numbers: Iterable[int]) -> None:
    for number in numbers:
        optimizer.zero_grad()
        naive.loss(values, batch(number)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Compare the difference's norm with the expected value's norm, which must not be zero."""
    size, expected = expected.detach().cpu().double().norm().item(), expected.detach().cpu().double()
    distance = (found.detach().cpu().double() - expected).norm().item()
    assert size > 0, what
    assert distance <= tolerance * size, f"{what}: {distance / size:.2e} of the norm, at most {tolerance:.2e}"
