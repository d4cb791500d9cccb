"""target_modules=[] under each strategy: the head is trained as on one device, and the file is that of one device."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback
from support.fsdp1 import fsdp1
from support.processes import world
from support.sharded import model_parallel
from support.strategies import (
    FIRST,
    OfFSDP2,
    OfTensorParallel,
    Run,
    Watched,
    WithTrainer,
    by_tensor,
    gathered_by_deepspeed,
    gathered_by_fsdp1,
    import_package,
    on_one_device,
    stage_2,
    stage_3,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),  # in one process
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
HEAD = ["net.4.weight", "net.4.bias"]
CLOSE = 1e-6


class HeadOnly(WithTrainer):
    def start(self, path: Path, source: Path | None, **options: object) -> L.Trainer:
        saves = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        lora = LoRACallback(**({} if source else {"target_modules": [], "modules_to_save": ["4"]}))
        return self.trainer(path, lora, saves, enable_checkpointing=True, **options)


ROWS = [
    HeadOnly("ddp", 2, 2, Watched, on_one_device),
    HeadOnly("FSDP2", 2, 2, OfFSDP2, model_parallel),
    HeadOnly("tensor parallel", 2, 2, OfTensorParallel, by_tensor, tensor=2),
    HeadOnly("FSDP1", 2, 2, Watched, fsdp1, state=gathered_by_fsdp1),
    HeadOnly("stage 2", 2, 2, Watched, stage_2),
    HeadOnly("stage 3", 2, 2, Watched, stage_3, state=gathered_by_deepspeed),
]
ONE = HeadOnly("one device", 1, 2, Watched, on_one_device)


def fit(row: WithTrainer, path: Path, source: Path | None = None) -> Run:
    return row.fit(path, source, 0, "")[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    path = tmp_path_factory.mktemp("alone")
    return fit(ONE, path), path / FIRST


@pytest.mark.parametrize("row", ROWS, ids=[row.label for row in ROWS])
def test_a_head_is_trained_and_resumed_as_on_one_device(tmp_path: Path, alone: tuple[Run, Path], row: HeadOnly):
    if row.label.startswith("stage"):
        if find_spec("deepspeed") is None:
            pytest.skip("needs the extra `deepspeed`")
        world().run(import_package, "deepspeed", timeout=240)
    expected, file = alone
    runs = world(2).run(fit, row, tmp_path / "new")
    runs += world(2).run(fit, row, tmp_path / "resumed", file)
    for found in runs:
        assert found.losses == pytest.approx(expected.losses[-len(found.losses) :], abs=CLOSE)
        assert not any(found.merged)
        for name, value in expected.state.items():
            assert (found.state[name] - value).abs().max() <= CLOSE, name
    own, ours = (torch.load(each, weights_only=True) for each in (tmp_path / "new" / FIRST, file))
    assert list(own["state_dict"]) == list(ours["state_dict"]) == HEAD
    assert own["lora"] == ours["lora"]
    for name in HEAD:
        torch.testing.assert_close(own["state_dict"][name], ours["state_dict"][name], atol=CLOSE, rtol=0)
