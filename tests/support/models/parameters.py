"""Modules of which single parameters are adapted, with inputs and a float64 reference that shares no code with the
package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn.adapted_module import adapted_layers

R, ALPHA = 3, 4.5


class Recurrent(nn.Module):
    """An LSTM or a GRU, whose inputs may be packed."""

    def __init__(self, kind: Callable[..., nn.Module], packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn, self.packed = kind(5, 6, batch_first=True, **options), packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            plain: torch.Tensor = self.rnn(x)[0].clone()  # FSDP2 warns of views
            return plain
        packed = pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)
        padded: torch.Tensor = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return padded


class Experts(nn.Module):
    """Experts of a forward of their own, which the package does not know."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = [(4, 5, 6), (4, 6, 5)] if is_transposed else [(4, 6, 5), (4, 5, 6)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) / 2) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in (self.gate_up_proj, self.down_proj):
            x = torch.einsum("...i,eio->...eo" if self.is_transposed else "...i,eoi->...eo", x, weight).sum(-2).tanh()
        return x


class Projected(nn.Module):
    """A matrix of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.projection.T


class Model(nn.Module):
    """A module with adapted parameters inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    adapted: int  # parameters


CASES = {
    "lstm": Case(lambda: Recurrent(nn.LSTM), ("weight_ih_l0", "weight_hh_l0"), 2),
    "lstm, projected, both ways": Case(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=4),
        ("weight_ih_l1", "weight_hh_l0_reverse", "weight_hr_l1_reverse", "rnn.weight_hr_l0"),
        4,
    ),
    "lstm, packed": Case(lambda: Recurrent(nn.LSTM, packed=True), ("weight_ih_l0", "weight_hh_l0"), 2),
    "gru": Case(lambda: Recurrent(nn.GRU, num_layers=2, bias=False), ("weight_hh_l1", "weight_ih_l0"), 2),
    "gru, packed": Case(lambda: Recurrent(nn.GRU, packed=True, bidirectional=True), ("weight_hh_l0_reverse",), 1),
    "experts": Case(Experts, ("gate_up_proj", "inner.down_proj"), 2),
    "one of two stacks": Case(Experts, ("down_proj",), 1),
    "transposed experts": Case(lambda: Experts(is_transposed=True), ("gate_up_proj", "down_proj"), 2),
    "matrix": Case(Projected, ("projection",), 1),
    "weight of a linear layer": Case(lambda: nn.Linear(5, 7), ("inner.weight",), 1),
}


@dataclass
class Subject:
    """An adapted model beside the plain one, with an input."""

    model: Model
    plain: Model
    x: torch.Tensor
    is_transposed: bool

    def reference(self, factors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The plain model in float64 on W + s * B @ A, from the definitions, differentiable in the factors."""
        factors = factors if factors is not None else self.factors()
        wide = copy.deepcopy(self.plain).double()
        state: dict[str, torch.Tensor] = dict(wide.named_parameters())
        for name in adapted_layers(self.model):
            module, _, leaf = name.rpartition(".")
            a, b = (factors[f"{module}.lora_{factor}_{leaf}"].double() for factor in "AB")
            state[name] = state[name] + ALPHA / R * delta(a, b, state[name], self.is_transposed)
        result: torch.Tensor = functional_call(wide, state, (self.x.double(),))
        return result

    def factors(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if "lora_" in name}


def delta(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """B @ A of each expert by itself."""
    if weight.dim() == 2:
        return torch.einsum("mr,rn->mn", b, a)
    parts = [b_e @ a_e for a_e, b_e in zip(a.chunk(len(weight)), b.chunk(len(weight)), strict=True)]
    return torch.stack([part.T if transposed else part for part in parts])


def make_subject(name: str, dtype: torch.dtype = torch.float32, *, fill: bool = True, **options: Any) -> Subject:
    """A model in evaluation mode with an adapter of about W's size, or as injection left it."""
    torch.manual_seed(0)
    case = CASES[name]
    plain = Model(case.build()).to(dtype).eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=case.targets, **options))
    if fill:
        fill_factors_(model)
    return Subject(model, plain, torch.randn(2, 4, 5).to(dtype), name.startswith("transposed"))


def fill_factors_(model: nn.Module, size: float = 0.3) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape))
