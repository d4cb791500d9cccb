"""What each strategy costs a rank: formulas of support/ranks/scale.py against memory and traffic of small models."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, merge, unmerge
from support.models.llama import RANK, TINY, Block, network
from support.ranks.deepspeed import zero
from support.ranks.fsdp1 import fsdp1
from support.ranks.processes import world
from support.ranks.scale import Costs, Share, by_ddp, by_deepspeed, by_fsdp1, by_hsdp
from support.ranks.sharded import DEVICE
from support.ranks.strategies import import_package, on_one_device
from support.runs.recorders import Traffic

pytestmark = pytest.mark.slow
FLAGS = 256  # bytes that ranks agree with
STEPS = 3  # what is counted is the last one: the first ones learn the order of layers


def received(sent: list[tuple[str, int]], n: int = 0) -> float:
    """Bytes that a rank receives in recorded collectives of n ranks or of all, by a ring where they add up."""
    n = n or dist.get_world_size()
    of_each = {
        "allgather_base": n - 1,
        "all_gather_into_tensor": n - 1,
        "allgather": (n - 1) / (n + 1),  # recorded with what comes
        "reduce_scatter_base": (n - 1) / n,
        "broadcast": (n - 1) / n,  # of a slice by each rank in turn
        "allreduce": 2 * (n - 1) / n,
    }
    return sum(of_each[name.strip("_")] * size for name, size in sent)


class Counted(L.LightningModule):
    """Counts what the last step receives, and what this rank holds after it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(TINY)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).float().square().mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.traffic = Traffic()
        self.traffic.__enter__()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.traffic.__exit__(None, None, None)
        if batch_idx == STEPS - 1:
            self.step, self.held = received(self.traffic.sent), held(self.trainer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def held(trainer: Any) -> tuple[int, int]:
    """Bytes of the base, and of the adapter with what the optimizer keeps."""
    named = [*trainer.lightning_module.named_parameters()]
    units = FullyShardedDataParallel.fsdp_modules(trainer.model)
    base = [p for name, p in named if "lora_" not in name and not units]
    base += [unit._handle.flat_param._local_shard for unit in units if unit._handle]
    factors = [p for name, p in named if "lora_" in name]
    optimizer = trainer.optimizers[0]
    copies = getattr(
        optimizer, "fp32_partitioned_groups_flat", getattr(optimizer, "single_partition_of_fp32_groups", [])
    )
    states = getattr(optimizer, "optimizer", optimizer).state.values() if copies else optimizer.state.values()
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    mine = [getattr(tensor, "ds_tensor", tensor) for tensor in (*base, *factors)]
    return sum(t.nbytes for t in mine[: len(base)]), sum(t.nbytes for t in (*mine[len(base) :], *copies, *moments))


def counted(trainer: Any, path: Path) -> Share:
    """Train a few steps with a Trainer, then merge."""
    fitting = trainer(path, LoRACallback(), max_steps=STEPS, max_epochs=1)
    rows = DataLoader(TensorDataset(torch.arange(4 * STEPS).view(STEPS, 4)))
    fitting.fit(model := Counted(), rows)
    with Traffic() as sent:
        merge(model)
    unmerge(model)
    return Share(*model.held, 0, model.step, received(sent.sent))


def by_blocks(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return fsdp1(path, *callbacks, options={"auto_wrap_policy": {Block}}, **options)


def stage(number: int, path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Of stage 3 nothing is kept gathered, as of a model for which there is no memory."""
    divided: dict[str, Any] = {"stage": number}
    if number == 3:
        divided |= {
            f"stage3_{name}": 0 for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        }
        divided["stage3_param_persistence_threshold"] = 0
    config = {"zero_optimization": divided, "zero_allow_untested_optimizer": True}
    return zero(path, *callbacks, stage=number, options={"config": config}, **options)


def assert_as_on_paper(found: Share, paper: Share) -> None:
    print(found, paper)
    assert (found.base, found.adapter) == (paper.base, paper.adapter)
    assert (found.step, found.merge) == pytest.approx((paper.step, paper.merge), abs=FLAGS)


@pytest.mark.parametrize(("trainer", "formula"), [(on_one_device, by_ddp), (by_blocks, by_fsdp1)], ids=["ddp", "fsdp1"])
def test_a_rank_holds_and_receives_what_is_on_paper(tmp_path, trainer, formula):
    wide = 2 if trainer is on_one_device else 4  # Lightning casts the base to the Trainer's precision
    for found in world().run(counted, trainer, tmp_path):
        assert_as_on_paper(found, formula(Costs(TINY, 2, r=RANK, wide=wide)))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rank_of_deepspeed_holds_and_receives_what_is_on_paper(tmp_path, number):
    world().run(import_package, "deepspeed", timeout=240)
    for found in world().run(counted, partial(stage, number), tmp_path):
        assert_as_on_paper(found, by_deepspeed(Costs(TINY, 2, r=RANK, wide=4), number))


def counted_by_hand(groups: int) -> Share:
    """FSDP2 in groups of ranks that hold the same shards."""
    model, others = network(TINY), dist.get_world_size() // groups
    mesh = init_device_mesh(DEVICE, (groups, others), mesh_dim_names=("replicate", "shard"))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    with Traffic() as step:
        model(torch.arange(8).view(2, 4)).float().square().mean().backward()
    with Traffic() as merging:
        merge(model)
    unmerge(model)
    sums = [entry for entry in step.sent if entry[0] == "allreduce_"]  # between the groups; all else is inside
    inside = [entry for entry in step.sent if entry not in sums]
    gathers = [entry for entry in merging.sent if "gather" in entry[0]]
    return Share(0, 0, 0, received(inside, others) + received(sums, groups), received(gathers, others))


def test_a_rank_of_hsdp_receives_what_is_on_paper():
    paper = by_hsdp(Costs(TINY, 4, r=RANK), 2)
    for found in world(4).run(counted_by_hand, 2):
        assert (found.step, found.merge) == pytest.approx((paper.step, paper.merge), abs=FLAGS)
