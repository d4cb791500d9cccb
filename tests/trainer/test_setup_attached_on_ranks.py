"""LoRACallback(attach=...) under strategies that divide a model: it trains, evaluates and resumes as on one device."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, LoRAConfig, inject, save_adapter, scaled
from support.models.networks import randomise_
from support.ranks.deepspeed import gathered_by_deepspeed
from support.ranks.fsdp1 import gathered_by_fsdp1
from support.ranks.processes import world
from support.ranks.sharded import BATCHES, TARGETS, Plain, model_parallel
from support.ranks.strategies import (
    EPOCHS,
    FIRST,
    LAST,
    OPTIONS,
    OfFSDP2,
    Run,
    Watched,
    WithTrainer,
    fsdp1_by_layers,
    import_package,
    on_one_device,
    stage_2,
    stage_3,
    tensors_in,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),  # in one process
]


@dataclass(frozen=True)
class Attachment(WithTrainer):
    """A strategy of Lightning's Trainer, with an adapter of this folder beside the trained one."""

    folder: Path = field(default=Path(), kw_only=True)

    def start(self, path: Path, source: Path | None, **options: Any) -> L.Trainer:
        saves = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        beside = {"sft": {"source": self.folder, "strength": 0.5}}
        lora = LoRACallback(**({} if source else OPTIONS), attach=beside)
        return self.trainer(path, lora, saves, enable_checkpointing=True, **options)


class Compares(Watched):
    """Trains on the difference to the model without the trained adapter, as DPO does, and looks at it in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.no_grad(), scaled(self, 0.0):
            reference = self(batch[0]).log_softmax(1)
        return F.cross_entropy(self(batch[0]).log_softmax(1) - 0.5 * reference, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.state.fn == "fit" and self.trainer.current_epoch == EPOCHS - 1:
            with scaled(self, 0.0):
                self(batch[0])
        super().validation_step(batch, batch_idx)


class ComparesUnderFSDP2(Compares, OfFSDP2):
    """The same, sharded."""


STRATEGIES: dict[str, Any] = {
    "FSDP2": (ComparesUnderFSDP2, model_parallel, {}),
    "FSDP1": (Compares, fsdp1_by_layers, {"state": gathered_by_fsdp1, "restores": False}),
    "DeepSpeed, stage 2": (Compares, stage_2, {"package": "deepspeed"}),
    "DeepSpeed, stage 3": (Compares, stage_3, {"package": "deepspeed", "state": gathered_by_deepspeed}),
}


def strategy(name: str, folder: Path) -> Attachment:
    model, trainer, options = STRATEGIES.get(name, (Compares, on_one_device, {}))
    return Attachment(name, 2, 2, model, trainer, folder=folder, **options)


def runs(name: str, folder: Path, path: Path) -> tuple[Run, Run, Run]:
    """A fit, the same resumed from its second epoch, and an evaluation of its last checkpoint."""
    each = strategy(name, folder)
    if each.package:
        import_package(each.package)
    _, whole = each.fit(path / "whole", None, 0, "")
    _, resumed = each.fit(path / "whole", path / "whole" / FIRST, 1, "")
    return whole, resumed, each.evaluate(path / "whole", path / "whole" / LAST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inject(net := Plain(), LoRAConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    randomise_(net, 0.3)
    path = tmp_path_factory.mktemp("sft") / "sft"
    save_adapter(net, path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Run, Run, Run]]:
    path = tmp_path_factory.mktemp("alone")
    found = runs("one device", folder, path)
    assert found[0].losses[-len(found[1].losses) :] == found[1].losses
    return path, found


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_trains_evaluates_and_resumes_as_one_device(folder: Path, alone: Any, name: str):
    if STRATEGIES[name][2].get("package") and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    of_one, (expected, _, _) = alone
    with tempfile.TemporaryDirectory() as path:
        for whole, resumed, evaluated in world().run(runs, name, folder, Path(path), timeout=280):
            assert whole.losses == pytest.approx(expected.losses, rel=1e-4)
            assert resumed.losses == pytest.approx(whole.losses[-len(resumed.losses) :], rel=1e-5)
            assert len(resumed.losses) == EPOCHS - 2
            assert evaluated.losses == pytest.approx(whole.losses[-1:], rel=1e-5)
            assert whole.merged == [True] * (EPOCHS - 1) * BATCHES + [False] * BATCHES
            assert evaluated.merged == [True] * BATCHES
        saved, there = Path(path) / "whole" / LAST, of_one / "whole" / LAST
        for key, value in tensors_in(there).items():
            torch.testing.assert_close(tensors_in(saved)[key], value, rtol=1e-3, atol=1e-5)
        assert tensors_in(saved).keys() == tensors_in(there).keys()
        beside = [torch.load(each, weights_only=True)["lora"]["beside"] for each in (saved, there)]
        assert beside[0] == beside[1]
        assert beside[0]["sft"][0] == 0.5
