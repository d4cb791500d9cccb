"""The checkpoint of each strategy is the file that one device writes, and every other strategy goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, lora_param_groups
from support.ranks.deepspeed import gathered_by_deepspeed
from support.ranks.fsdp1 import fsdp1, gathered_by_fsdp1
from support.ranks.processes import world
from support.ranks.sharded import model_parallel
from support.ranks.strategies import (
    FIRST,
    OPTIONS,
    OfFSDP2,
    OfTensorParallel,
    Run,
    Watched,
    WithTrainer,
    by_tensor,
    import_package,
    on_one_device,
    stage_1,
    stage_2,
    stage_3,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),  # in one process
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
CLOSE = 1e-6


class InGroups:
    """Two groups with learning rates of their own, a decay and a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(lora_param_groups(self, lr=0.02, lr_ratio=4, weight_decay=0.1))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class WatchedInGroups(InGroups, Watched):
    pass


class OfFSDP2InGroups(InGroups, OfFSDP2):
    pass


class OfTensorParallelInGroups(InGroups, OfTensorParallel):
    pass


class Merged(WithTrainer):
    """Saves merged checkpoints."""

    def start(self, path: Path, source: Path | None, **options: Any) -> L.Trainer:
        saves = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        lora = LoRACallback(**({} if source else OPTIONS), save="merged")
        return self.trainer(path, lora, saves, enable_checkpointing=True, **options)


CASES: dict[str, Any] = {
    "adapter, all parameters, frozen ones too": (WithTrainer, Watched, OfFSDP2, OfTensorParallel),
    "merged, two groups": (Merged, WatchedInGroups, OfFSDP2InGroups, OfTensorParallelInGroups),
}
STRATEGIES = ["one device", "ddp", "FSDP2", "tensor parallel", "FSDP1", "stage 1", "stage 2", "stage 3"]


def rows(case: str) -> dict[str, WithTrainer]:
    row, plain, of_fsdp2, of_tensor_parallel = CASES[case]
    found = [
        row("one device", 1, 2, plain, on_one_device),
        row("ddp", 2, 2, plain, on_one_device),
        row("FSDP2", 2, 2, of_fsdp2, model_parallel),
        row("tensor parallel", 2, 2, of_tensor_parallel, by_tensor, tensor=2),
        row("FSDP1", 2, 2, plain, fsdp1, state=gathered_by_fsdp1),
    ]
    if find_spec("deepspeed") is not None:
        world().run(import_package, "deepspeed", timeout=240)
        found += [
            row("stage 1", 2, 2, plain, stage_1),
            row("stage 2", 2, 2, plain, stage_2),
            row("stage 3", 2, 2, plain, stage_3, state=gathered_by_deepspeed),
        ]
    return {each.label: each for each in found}


def fit(row: WithTrainer, path: Path, source: Path | None, seed: int) -> Run:
    return row.fit(path, source, seed, "")[1]


def fits(row: WithTrainer, path: Path, source: Path | None = None, seed: int = 0) -> list[Run]:
    return [fit(row, path, source, seed)] if row.ranks == 1 else world(2).run(fit, row, path, source, seed)


@dataclass(frozen=True)
class Written:
    """The checkpoints of a fit in each strategy, and what came of that on one device."""

    rows: dict[str, WithTrainer]
    files: dict[str, Path]
    alone: Run

    def file(self, strategy: str) -> Path:
        if strategy not in self.files:
            pytest.skip("needs the extra `deepspeed`")
        return self.files[strategy]


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    found, folder = rows(request.param), tmp_path_factory.mktemp("fits")
    runs = {label: fits(row, folder / label)[0] for label, row in found.items()}
    return Written(found, {label: folder / label / FIRST for label in found}, runs["one device"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_file_of_one_device_is_resumed_in_each_strategy_as_there(tmp_path, written: Written, strategy: str):
    """So that of each strategy is, which holds the same: see below."""
    written.file(strategy)  # or it is skipped
    for found in fits(written.rows[strategy], tmp_path, written.file("one device"), 5):  # from another seed
        assert found.losses == pytest.approx(written.alone.losses[-1:], abs=CLOSE)
        assert found.state.keys() == written.alone.state.keys()
        for name, value in written.alone.state.items():
            assert (found.state[name] - value).abs().max() <= CLOSE, name


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_the_file_of_a_strategy_holds_what_that_of_one_device_holds(written: Written, strategy: str):
    """The trained tensors and the optimizer's states, by the same names and positions, and nothing beside."""
    (found, bytes_found), (expected, bytes_expected) = map(read, (written.file(strategy), written.file("one device")))
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[place], value, atol=CLOSE, rtol=0)
    groups = [place for place in expected if place[:1] == ("optimizer_states",) and "param_groups" in place]
    assert {place: found[place] for place in groups} == {place: expected[place] for place in groups}
    assert bytes_found == bytes_expected


def read(file: Path) -> tuple[dict[Any, Any], int]:
    """Read what differs between strategies, by the keys that lead to it; and the bytes of all that lies in the file."""
    content = torch.load(file, weights_only=True)
    leaves = dict(leaves_of({key: content[key] for key in ("state_dict", "optimizer_states", "lora")}))
    tensors = [value for value in leaves.values() if isinstance(value, torch.Tensor)]
    return leaves, sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def leaves_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield place, value
    for key, item in items or ():
        yield from leaves_of(item, (*place, key))
