"""Patterns of any form in a user's code: files hold them as words and the layers by name, and load and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.command.main import main
from lightning_lora.nn.adapted_module import adapted_layers
from support.models.networks import randomise_
from support.models.peers import call


class Block(nn.Module):
    """Two layers to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.v_proj(self.q_proj(x))


class Net(LightningModule):
    """Blocks whose numbers begin with each other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(*(Block() for _ in range(11)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 1e-3)


PATTERNS: dict[str, dict[str, Any]] = {
    "in a look-ahead": {"target_modules": r"(?=(.*\.)+q).*q_proj"},
    "a match again": {"target_modules": r"(l)ayers.*(?:q|v)_proj(?:\1)?"},
    "with blanks": {"target_modules": r"(?x) .* q_proj"},
    "layers by number": {"target_modules": ["q_proj"], "layers_to_transform": [1, 10], "layers_pattern": "(layers)+"},
    "ranks by patterns and names": {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"(.*\.)+1\.q_proj": 3, "layers.10.q_proj": 5},
    },
    "all at once": {
        "target_modules": r"(.*\.)+[qv]_proj",
        "exclude_modules": r"(.*\.)+3\.v_proj",
        "rank_pattern": {r"(.*\.)+1\d?\.q_proj": 3},
        "alpha_pattern": {r"(.*\.)+v_proj": 3.5},
        "modules_to_save": ["layers.3.v_proj"],
    },
}


def adapted(name: str) -> Net:
    inject(net := Net(), LoRAConfig(r=2, **PATTERNS[name]))
    randomise_(net)
    return net


def layers(net: nn.Module) -> dict[str, tuple[int, float]]:
    return {name: (each.lora.spec.r, each.lora.spec.scaling) for name, each in adapted_layers(net).items()}


def check_same(net: nn.Module, other: nn.Module) -> None:
    assert layers(net) == layers(other) != {}
    x = torch.randn(3, 4)
    assert torch.equal(net(x), other(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_own_pattern_comes_back_from_a_saved_adapter_and_peft_reads_it_as_it_is_here(tmp_path: Path, name: str):
    save_adapter(net := adapted(name), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(Net().layers, tmp_path / "adapter")  # the network alone
    x = torch.randn(3, 4)
    torch.testing.assert_close(theirs(x), net(x))
    load_adapter(other := Net(), tmp_path / "adapter")
    check_same(net, other)
    save_adapter(other, tmp_path / "again")
    load_adapter(again := adapted(name), tmp_path / "again")
    check_same(net, again)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_with_an_own_pattern_resumes_and_its_checkpoint_loads_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def trainer(steps: int) -> Trainer:
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 9}
        callback = LoRACallback(r=2, verbose=False, **PATTERNS["all at once"])
        return Trainer(max_steps=steps, callbacks=[callback], enable_model_summary=False, accelerator="cpu", **options)

    data = DataLoader(torch.ones(4, 4), batch_size=2)
    first, resumed, file = Net(), Net(), tmp_path / "adapter.ckpt"
    (begun := trainer(2)).fit(first, data)
    begun.save_checkpoint(file)
    trainer(3).fit(resumed, data, ckpt_path=file)
    assert layers(resumed) == layers(first)
    check_same(first, load_from_checkpoint(Net, file))
    load_adapter(other := Net(), file)
    check_same(first, other)
    call(capsys, "export", file, tmp_path / "exported")
    load_adapter(other := Net(), tmp_path / "exported")
    check_same(first, other)
    assert main(["info", str(tmp_path / "exported")]) == 0
    trainer(3).fit(Net(), data, ckpt_path=file)
