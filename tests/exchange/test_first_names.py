"""A module under two names: in every file it has the options of its first name, by which it was adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    combine,
    export_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.files.expected_weights import merge_and_check
from support.models.networks import checkpoint
from support.models.peers import fill_, seeded
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import make_trainer


class Twice(nn.Module):
    """A layer, and a block with a layer, under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.other = nn.Linear(6, 9)
        self.block = nn.Sequential(nn.Linear(9, 6))
        self.again = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.again(self.other(self.second(self.first(x).relu()).relu()).relu())
        return result


def network() -> Any:
    """In float64, in which each order of sums gives the same digits."""
    return seeded(Twice).double()


class Net(L.LightningModule):
    """The whole network under two names too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.alias = self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


MODELS: dict[str, Callable[[], nn.Module]] = {"network": network, "LightningModule": Net}
OPTIONS: dict[str, dict[str, Any]] = {
    "both": {"rank_pattern": {"first": 1}, "alpha_pattern": {"first": 5}, "use_rslora": True},
    "other names too": {"rank_pattern": {"first": 4, "other": 3}, "alpha_pattern": {"o.*r": 2}},
    "a block": {"rank_pattern": {r"block\.0": 3}, "bias": "all"},
    "a start": {"rank_pattern": {"first": 3}, "init_lora_weights": "pissa"},
    "magnitudes": {"rank_pattern": {"first": 3}, "use_dora": True},
    "parts and rank": {
        "target_modules": ["first", "other"],
        "enable_lora": {"first": [True, False]},
        "rank_pattern": {"first": 1},
    },
}


def config(case: str) -> LoRAConfig:
    return LoRAConfig(**{"r": 2, "lora_alpha": 3, "target_modules": "all-linear", **OPTIONS[case]})


def adapted(kind: str, case: str) -> nn.Module:
    net = MODELS[kind]()
    inject(net, config(case))
    return fill_(net)


def answers(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = net.eval()(torch.linspace(-1, 1, 18).view(3, 6).double())
    return result


def exported(net: nn.Module, path: Path) -> Any:
    torch.save(checkpoint(net, "adapter"), path / "to_export.ckpt")
    export_adapter(path / "to_export.ckpt", path / "exported")
    return path / "exported"


def folder(net: nn.Module, path: Path) -> Any:
    save_adapter(net, path / "folder")
    return path / "folder"


DOORS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "folder": folder,
    "adapter": lambda net, path: checkpoint(net, "adapter"),
    "merged": lambda net, path: checkpoint(net, "merged"),
    "full": lambda net, path: checkpoint(net, "full"),
    "export": exported,
    "combine": lambda net, path: combine([folder(net, path)], [1.0]),
}


@pytest.mark.parametrize(("case", "kind"), covering(OPTIONS, MODELS, meet=1))
def test_every_door_loads_what_has_options_by_its_first_name(tmp_path, case: str, kind: str):
    net = adapted(kind, case)
    for door, source_of in DOORS.items():
        if (case, door) == ("magnitudes", "combine"):
            continue  # which is refused
        load_adapter(fresh := MODELS[kind](), source_of(net, tmp_path))
        torch.testing.assert_close(answers(fresh), answers(net), rtol=0, atol=1e-12, msg=door)


@pytest.mark.parametrize("case", ["both", "parts and rank"])
def test_a_model_that_loads_a_checkpoint_has_the_options_that_were_given(case: str):
    load_adapter(fresh := network(), checkpoint(adapted("network", case), "adapter"))
    found = open_model(fresh, "test").injection.config
    assert replace(found, enable_lora=config(case).enable_lora) == config(case)
    assert found.enabled_parts("first") == config(case).enabled_parts("first")
    assert inject(fresh, found)


def test_a_run_resumes_and_its_checkpoint_builds_the_model(tmp_path):
    options = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", **OPTIONS["parts and rank"]}
    data = torch.utils.data.DataLoader(torch.linspace(-1, 1, 24).view(4, 6).double(), batch_size=2)  # type: ignore[arg-type]
    ends = []
    for epochs, start in ((2, None), (1, None), (2, tmp_path / "1.ckpt")):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, LoRACallback(seed=1, **options), max_epochs=epochs)
        trainer.fit(model := Net().train(), data, ckpt_path=start, **(PLAIN_TYPES_ONLY if start else {}))
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        ends.append(answers(model))
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(answers(load_from_checkpoint(Net, tmp_path / "2.ckpt")), ends[0])


@pytest.mark.parametrize(("case", "form"), covering(OPTIONS, ["pt", "safetensors"], meet=1))
def test_merge_changes_both_names_of_a_base_file(tmp_path, case: str, form: str):
    net, plain = adapted("network", case), network()
    base, out = tmp_path / f"base.{form}", tmp_path / f"out.{form}"
    if form == "pt":  # which holds the values once
        torch.save(plain.state_dict(), base)
    else:
        save_file({name: value.clone() for name, value in plain.state_dict().items()}, base)
    merge_and_check(base, folder(net, tmp_path), out)
    merged = torch.load(out) if form == "pt" else load_file(out)
    assert torch.equal(merged["first.weight"], merged["second.weight"])
    plain.load_state_dict(merged)
    torch.testing.assert_close(answers(plain), answers(net), rtol=0, atol=1e-12)
