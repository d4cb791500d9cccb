"""DeepSpeed's stage 3 with each kind of layer and each variant, with layers that zero.Init divides, and in a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    inject,
)
from support.ranks.deepspeed import zero
from support.ranks.processes import world
from support.ranks.sharded import make_trainer
from support.ranks.sharded_adapters import assert_same_bits
from support.ranks.strategies import import_package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
]

State = dict[str, torch.Tensor]
WIDTH, TOKENS = 6, 9


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    """Its import takes a while, which is no part of a test's time."""
    world().run(import_package, "deepspeed", timeout=240)


def whole_state(model: nn.Module) -> State:
    """A state dict that DeepSpeed has gathered."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.einsum("...d,end->...n", x, self.stack)


class Conv(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mT).mT


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


BODIES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
    "lstm": Recurrent,
    "conv": lambda: Conv(WIDTH, WIDTH, 3, padding=1),
    "experts": Experts,
}


class Net(L.LightningModule):
    """An embedding, a body and a head, of which the last may be tied to the first."""

    def __init__(self, body: str = "linear", *, tied: bool = False, builds: str = "__init__") -> None:
        super().__init__()
        self.body_name, self.tied, self.builds = body, tied, builds
        self.losses: list[float] = []
        if builds == "__init__":
            self.build()

    def build(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed, self.body = nn.Embedding(TOKENS, WIDTH), BODIES[self.body_name]()
            self.head = nn.Linear(WIDTH, TOKENS)
        if self.tied:
            self.head.weight = self.embed.weight

    def configure_model(self) -> None:  # in deepspeed.zero.Init
        if not hasattr(self, "head"):
            self.build()
            if self.builds == "and injects":
                inject(self, LoRAConfig(r=2, target_modules=["body", "head"]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.tanh(self.body(self.embed(tokens))))
        return result

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def batches(seed: int) -> DataLoader[Any]:
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    tokens = torch.randint(TOKENS, (2, 12, 5), generator=torch.Generator().manual_seed(seed))
    rows = TensorDataset(*tokens)
    sampler: DistributedSampler[Any] = DistributedSampler(rows, size, rank, shuffle=False)
    return DataLoader(rows, batch_size=4 // size, sampler=sampler)


@dataclass
class Case:
    lora: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[Net, LoRACallback]:
        torch.manual_seed(0)
        return Net(**self.model), LoRACallback(**{"r": 2} | self.lora)


def rows_of(*targets: str) -> dict[str, Any]:
    return {"target_modules": [*targets], "trainable_token_indices": {"embed": [1, 4, 5]}}


BUILT = {"builds": "configure_model"}
CASES = {
    "encoder layer": Case({"target_modules": ["linear1", "linear2", "head"]}, {"body": "encoder"}),
    "attention": Case({"target_modules": ["self_attn", "out_proj"]}, {"body": "encoder"}),
    "LSTM": Case(
        {"target_modules": [], "target_parameters": ["weight_ih_l0", "weight_hh_l0"]},
        {"body": "lstm"},
    ),
    "convolution, embedding, DoRA": Case({"target_modules": ["body", "embed"], "use_dora": True}, {"body": "conv"}),
    "experts": Case({"target_modules": ["head"], "target_parameters": ["body.stack"]}, {"body": "experts"}),
    "rows of a tied table": Case(rows_of("body"), {"tied": True}),
    "tied weight": Case({"target_modules": ["body", "embed"]}, {"tied": True}),
    "parts": Case({"target_modules": ["head"], "enable_lora": {"head": [True, False, True]}}),
    "LoHa": Case({"variant": "loha", "r": 1}),
    "merge_after_fit": Case({"merge_after_fit": True}),
    "divided at once, injected by the module": Case({"target_modules": ["body", "head"]}, {"builds": "and injects"}),
    "divided at once, PiSSA": Case({"target_modules": ["body", "head"], "init_lora_weights": "pissa"}, BUILT),
    "divided at once, DoRA": Case({"target_modules": ["body"], "use_dora": True, "modules_to_save": ["head"]}, BUILT),
    "divided at once, rows": Case(rows_of("head"), BUILT),
}


@dataclass
class Run:
    losses: list[float]
    state: State


def fit(case: Case, path: Path) -> Run:
    """A fit on this world's ranks, or on one device."""
    model, callback = case.build()
    on_ranks = dist.is_initialized()
    trainer = zero(path, callback, stage=3, max_epochs=2) if on_ranks else make_trainer(path, callback, max_epochs=2)
    trainer.fit(model, batches(1), batches(2))
    return Run(model.losses, whole_state(model))


@pytest.mark.parametrize("name", CASES)
def test_layer_and_variant_train_and_merge_as_on_one_device(tmp_path, name):
    expected, base = fit(CASES[name], tmp_path / "alone"), Net(CASES[name].model.get("body", "linear")).state_dict()
    for found in world().run(fit, CASES[name], tmp_path / "ranks"):
        assert found.losses == pytest.approx(expected.losses, abs=1e-6)
        assert found.state.keys() == expected.state.keys()
        for key, value in expected.state.items():
            torch.testing.assert_close(found.state[key], value, atol=3e-6, rtol=0)
        frozen = [key for key in base if torch.equal(expected.state[key], base[key])]
        assert "merge_after" in name or len(frozen) >= 3
        assert_same_bits({key: found.state[key] for key in frozen}, {key: base[key] for key in frozen})


def said(case: Case, path: Path) -> str:
    try:
        fit(case, path)
    except LoRAError as error:
        return str(error)
    return ""


def test_start_from_inputs_runs_and_one_from_gradients_of_whole_weights_is_refused(tmp_path):
    assert world().run(said, Case({"init_lora_weights": "eva"}), tmp_path) == ["", ""]
    for error in world().run(said, Case({"init_lora_weights": "lora_ga"}), tmp_path):
        assert error.startswith("initialize_from_data: the weight of 'body' is sharded")
        assert "call initialize_from_data before the model is sharded" in error
