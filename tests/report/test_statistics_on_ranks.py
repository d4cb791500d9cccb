"""adapter_stats and LoRAMonitor on several ranks: on each one the numbers of one process on the same global batch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import parallelize_module

import support.models.parameters as single
import support.models.token_rows as tables
from lightning_lora import LoRAConfig, LoRAMonitor, adapter_stats, inject
from lightning_lora.report.statistics import AdapterStats
from support.models.networks import randomise_
from support.ranks.processes import BACKEND, world
from support.ranks.sharded import DEVICE, WAYS, Plain, Sharded, X, data, loader, make_trainer, shard_
from support.ranks.sharded_adapters import PLANS, TENSOR_X, adapters, block, injected, lora, mesh

FIELDS = ("norm", "rank", "grad_A", "grad_B", "cosine")


def two_stats(model: Any, x: torch.Tensor) -> list[dict[str, dict[str, float]]]:
    """What two steps give, with gradients of the second."""
    first: AdapterStats | None = None
    found = []
    for _ in range(2):
        optimizer = torch.optim.SGD(adapters(model), lr=0.5)  # SequenceParallel would train its norm too
        optimizer.zero_grad()
        model(x).square().mean().backward()
        first = adapter_stats(model, first)
        found.append({group: stats.to_dict() for group, stats in first.groups.items()})
        optimizer.step()
    return found


def assert_close(found: Any, expected: Any, rel: float = 1e-4) -> None:
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for group, values in other.items():
            assert one[group] == pytest.approx(values, rel=rel), group


def sharded(way: str) -> Any:
    net = injected()
    shard_(net, **WAYS[way])
    return two_stats(net, X)


@pytest.mark.parametrize("way", ["layers", "root only", "by columns", "offloaded"])
def test_statistics_of_a_sharded_model_are_those_of_one_device_on_every_rank(way: str):
    expected = two_stats(injected(), X)
    assert set(expected[1]["layers"]) == set(FIELDS)
    for found in world().run(sharded, way):
        assert_close(found, expected)


def one_layer_sharded() -> Any:
    net = injected()
    fully_shard(net[0], mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    return two_stats(net, X)


def single_parameters(shard: bool) -> Any:
    torch.manual_seed(0)
    model = single.Model(single.CASES["experts"].build())
    inject(model, LoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]), seed=1)
    single.fill_factors_(model)
    if shard:
        fully_shard(model, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    return two_stats(model, torch.linspace(-1, 1, 40).view(2, 4, 5))


def trained_rows(shard: bool) -> Any:
    torch.manual_seed(0)
    model = tables.Net(tied=True)
    inject(model, LoRAConfig(r=2, target_modules=["body"], trainable_token_indices={"emb": tables.ROWS}), seed=1)
    randomise_(model)
    if shard:
        fully_shard(model, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    return two_stats(model, torch.arange(36).view(4, 9) % tables.NUMBER)


@pytest.mark.slow
def test_statistics_of_sharded_experts_rows_and_of_layers_that_are_whole_on_every_rank_are_those_of_one_device():
    assert set(trained_rows(False)[1]["emb"]) == {"norm", "grad_rows"}
    for found in world().run(one_layer_sharded):
        assert_close(found, two_stats(injected(), X))
    for found in world().run(single_parameters, True):
        assert_close(found, single_parameters(False))
    for found in world().run(trained_rows, True):
        assert_close(found, trained_rows(False))


def parallel(plan: str) -> Any:
    model = block()
    parallelize_module(model, mesh(), PLANS[plan])
    return two_stats(_Whole(model), TENSOR_X)


class _Whole(nn.Module):
    """Returns a plain tensor, whatever the plan."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.inner(x)
        whole: torch.Tensor = result.full_tensor() if hasattr(result, "full_tensor") else result
        return whole


@pytest.mark.parametrize("plan", PLANS)
def test_statistics_of_a_tensor_parallel_model_are_those_of_one_device(plan: str):
    expected = two_stats(_Whole(block()), TENSOR_X)
    for found in world().run(parallel, plan):
        assert_close(found, expected)


def gradient_of_partial_sums() -> Any:
    model: Any = block()
    parallelize_module(model, on := mesh(), PLANS["even"])
    factor = model.up.lora_A
    part = torch.full(factor.shape, 1.0 + dist.get_rank())
    factor.grad = DTensor.from_local(part, on, [Partial()])
    return adapter_stats(model).groups["up"].gradients, factor.numel() ** 0.5 * 3


def test_gradient_that_ranks_have_partial_sums_of_is_summed_first():
    for gradients, norm in world().run(gradient_of_partial_sums):
        assert gradients == {"A": pytest.approx(norm)}


# --- through a Trainer ---


STRATEGIES: dict[str, Any] = {
    "DDP": lambda size: DDPStrategy(process_group_backend=BACKEND),
    "FSDP2": lambda size: ModelParallelStrategy(size, 1),
    "alone": lambda size: "auto",
}


def fit(path: Path, kind: str) -> list[dict[str, float]]:
    """The columns of each logged step, as rank 0 writes them."""
    torch.manual_seed(0)
    size = dist.get_world_size() if dist.is_initialized() else 1
    options = {"strategy": STRATEGIES[kind](size), "devices": size, "max_epochs": 2, "log_every_n_steps": 2}
    trainer = make_trainer(path, lora(init_lora_weights=False, seed=1), LoRAMonitor(2, plots=False), **options)
    trainer.logger = CSVLogger(path, name=None, version=kind.lower())
    trainer.fit((Sharded if kind == "FSDP2" else Plain)(), *(data() if size > 1 else (loader(), loader(seed=6))))
    if size > 1:
        dist.barrier()
    rows = csv.DictReader((path / kind.lower() / "metrics.csv").read_text().splitlines())
    kept = [{n: float(v) for n, v in row.items() if v and n.startswith("lora/net/")} for row in rows]
    return [row for row in kept if row]


@pytest.mark.slow
def test_a_run_on_two_ranks_logs_what_one_process_logs(tmp_path: Path):
    expected = fit(tmp_path, "alone")
    assert [len(row) for row in expected] == [4, 5, 5]
    for kind in ("DDP", "FSDP2"):
        for rows in world().run(fit, tmp_path, kind):
            assert len(rows) == 3
            for row, other in zip(rows, expected, strict=True):
                assert row == pytest.approx(other, rel=1e-3)
