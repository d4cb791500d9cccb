"""Models with trained rows of tables, and references that follow the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, inject

NUMBER, WIDTH = 40, 6
ROWS = (3, 4, 5, 17, 39)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, rows: Iterable[int]) -> None:
    """Compare logits bit for bit. Those of trained rows are a separate product, and compared up to its rounding."""
    trained = torch.zeros(expected.shape[-1], dtype=torch.bool)
    trained[list(rows)] = True
    torch.testing.assert_close(found[..., ~trained], expected[..., ~trained], rtol=0, atol=0)
    torch.testing.assert_close(found[..., trained], expected[..., trained], rtol=1e-6, atol=1e-6)


class Net(nn.Module):
    """An embedding, a body and a head, which may be tied."""

    def __init__(
        self,
        *,
        tied: bool = False,
        bias: bool = False,
        table: Callable[..., nn.Embedding] = nn.Embedding,
        **options: Any,
    ) -> None:
        super().__init__()
        self.emb = table(NUMBER, WIDTH, **options)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, NUMBER, bias=bias)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(self.emb(tokens)).tanh())
        return result


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2.5


class Reader(Net):
    """A model that reads the weight of the embedding as the weight of the head."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(self.emb(tokens)).tanh(), self.emb.weight)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    indices: dict[str, tuple[int, ...]]
    tables: tuple[str, ...] = ("emb",)
    ties: dict[str, str] = field(default_factory=dict)


CASES = {
    "embedding": Case(Net, {"emb": ROWS}),
    "head": Case(Net, {"head": ROWS}, ("head",)),
    "head with a bias": Case(lambda: Net(bias=True), {"head": ROWS}, ("head",)),
    "both, untied": Case(Net, {"emb": ROWS, "head": (0, 2)}, ("emb", "head")),
    "tied": Case(lambda: Net(tied=True), {"emb": ROWS}, ("emb",), {"head": "emb"}),
    "tied, with a bias": Case(lambda: Net(tied=True, bias=True), {"head": ROWS}, ("emb",), {"head": "emb"}),
    "padding": Case(lambda: Net(padding_idx=4), {"emb": ROWS}),
    "padding, last": Case(lambda: Net(padding_idx=-1), {"emb": ROWS}),
    "scaled": Case(lambda: Net(table=Scaled), {"emb": ROWS}),
    "scaled, tied": Case(lambda: Net(table=Scaled, tied=True), {"emb": ROWS}, ("emb",), {"head": "emb"}),
    "reader": Case(Reader, {"emb": ROWS}),
    "one row": Case(Net, {"emb": (7,)}),
}


@dataclass
class Subject:
    """A model with trained rows, the plain model, and tokens."""

    model: Any
    plain: Any
    tokens: torch.Tensor
    case: Case

    def rows(self) -> dict[str, torch.Tensor]:
        """The trained rows, by table."""
        return {name: self.model.get_parameter(f"{name}.lora_rows").detach() for name in self.case.tables}

    def numbers(self, name: str) -> list[int]:
        return list(self.case.indices.get(name) or next(iter(self.case.indices.values())))

    def tables(self, rows: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Each table's weight in float64 with the rows in place, differentiable in them."""
        rows = rows if rows is not None else self.rows()
        whole = {}
        for name, values in rows.items():
            weight = self.plain.get_parameter(f"{name}.weight").detach().double()
            chosen = F.one_hot(torch.tensor(self.numbers(name)), len(weight)).double()
            whole[f"{name}.weight"] = weight * (1 - chosen.sum(0))[:, None] + chosen.T @ values.double()
        for end, first in self.case.ties.items():
            whole[f"{end}.weight"] = whole[f"{first}.weight"]
        return whole

    def reference(self, rows: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The plain model in float64 on the tables with the rows in place."""
        wide = copy.deepcopy(self.plain).double()
        result: torch.Tensor = functional_call(wide, self.tables(rows), (self.tokens,), tie_weights=False)
        return result


def fill_rows_(model: nn.Module, size: float = 1.0) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_rows" in name:
                parameter.copy_(size * torch.randn(parameter.shape))


def make_subject(name: str, dtype: torch.dtype = torch.float32, *, fill: bool = True, **options: Any) -> Subject:
    """A model in evaluation mode. Its rows are filled at random, or as injection made them."""
    torch.manual_seed(0)
    case = CASES[name]
    plain = case.build().to(dtype).eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices=case.indices, **options))
    if fill:
        fill_rows_(model)
    tokens = torch.randint(NUMBER, (4, 9))
    tokens[0, :6] = torch.tensor([*ROWS, 3])
    return Subject(model, plain, tokens, case)
