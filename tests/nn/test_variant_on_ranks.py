"""Each kind of adapter on two ranks: DDP and FSDP2 train, merge, restore, load and resume as one process does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    Variant,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    merged,
    merged_state_dict,
    save_adapter,
    unmerge,
)
from lightning_lora.distributed.sharding import rows_of
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.output_norms import norms_of_weight
from support.models.networks import fingerprint
from support.models.parameters import Experts, Projected
from support.models.token_rows import NUMBER, ROWS
from support.models.token_rows import Net as Tables
from support.ranks.processes import world
from support.ranks.sharded import RootSharded, base_of, model_parallel, optimizer_state, whole, whole_state
from support.ranks.sharded_adapters import PLAN, TENSOR_X, assert_same_bits, block, mesh

STEPS = 3
WAYS = ("DDP", "FSDP2", "FSDP2, a unit for each", "FSDP2, by columns")


class Own(Variant):
    """W' = W + s * B @ R @ A with frozen A and B; PEFT does not have it."""

    name, trained, frozen = "own-across", ("lora_across_R",), ("lora_across_A", "lora_across_B")

    def shapes(self, info: Any) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.leaves, ((info.rank, info.rank), *info.factor_shapes()), strict=True))

    def start(self, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(info.seed)
        return {leaf: torch.randn(shape, generator=draw) for leaf, shape in self.shapes(info).items()}

    def effective_factors(self, stored: Any, weight: Any, scaling: float) -> Any:
        square, a, b = (stored[leaf] for leaf in self.leaves)
        return square @ a, b, None


class Scaled(Variant):
    """W' = c * (W + s * B @ A) with a trained c, which needs no W."""

    name, trained = "scaled-across", ("lora_across_a", "lora_across_b", "lora_across_c")
    has_scale = True

    def shapes(self, info: Any) -> dict[str, tuple[int, ...]]:
        a, b = info.factor_shapes()
        return dict(zip(self.trained, (a, b, b[:1]), strict=True))

    def start(self, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        draw, (a, b, c) = torch.Generator().manual_seed(info.seed), self.shapes(info).values()
        return dict(zip(self.trained, (torch.randn(a, generator=draw), torch.zeros(b), torch.ones(c)), strict=True))

    def effective_factors(self, stored: Any, weight: Any, scaling: float) -> Any:
        assert weight is None, "which would be gathered"
        return tuple(stored[leaf] for leaf in self.trained)


class Layers(nn.Module):
    """A layer of each way in which a weight is stored; 7 outputs are uneven shards."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 7), Conv1D(5, 7)
        self.conv = nn.Conv1d(5, 9, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.tanh(self.up(self.emb(tokens % 11))))
        result: torch.Tensor = self.conv(hidden.transpose(1, 2))
        return result


class Parts(nn.Module):
    """Modules whose parameters are adapted singly."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lstm = nn.Embedding(NUMBER, 5), nn.LSTM(5, 5, batch_first=True)
        self.gru = nn.GRU(5, 5, num_layers=2, bias=False, batch_first=True)
        self.experts, self.turned, self.matrix = Experts(), Experts(is_transposed=True), Projected()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.gru(self.lstm(self.emb(tokens))[0].clone())[0].clone()  # FSDP2 warns of views
        result: torch.Tensor = self.matrix(self.turned(self.experts(x)))
        return result


@dataclass(frozen=True)
class Subject:
    build: Callable[[], nn.Module]
    options: dict[str, Any]
    ways: tuple[str, ...] = WAYS[:2]
    by_columns: list[tuple[int, ...]] = field(default_factory=list)  # shapes


SUBJECTS = {
    "dora": Subject(
        Layers, {"target_modules": ["emb", "up", "down", "conv"], "use_dora": True}, WAYS, [(11, 6), (7, 6)]
    ),
    "pissa": Subject(Layers, {"target_modules": ["up", "conv"], "init_lora_weights": "pissa"}),
    "olora": Subject(Layers, {"target_modules": ["up", "down"], "init_lora_weights": "olora"}),
    "loha": Subject(Layers, {"target_modules": ["up", "conv"], "variant": "loha"}),
    "own": Subject(Layers, {"target_modules": ["up"], "variant": "own-across"}),
    "own scale": Subject(Layers, {"target_modules": ["up", "down", "conv"], "variant": "scaled-across"}),
    "parameters": Subject(
        Parts,
        {
            "target_modules": [],
            "target_parameters": [
                *("lstm.weight_ih_l0", "lstm.weight_hh_l0", "gru.weight_hh_l1", "gru.weight_ih_l0"),
                *("gate_up_proj", "down_proj", "projection"),
            ],
        },
    ),
    "rows": Subject(
        Tables,
        {"target_modules": ["body"], "trainable_token_indices": {"emb": ROWS, "head": (0, 38)}},
        WAYS,
        [(NUMBER, 6)],
    ),
    "tied rows": Subject(
        lambda: Tables(tied=True), {"target_modules": ["body"], "trainable_token_indices": {"emb": ROWS}}
    ),
}


def plain(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return SUBJECTS[name].build()


def adapted(name: str, seed: int = 0, *, fill: bool = False) -> Any:
    model = plain(name, seed)
    inject(model, LoRAConfig(**{"r": 2, "lora_alpha": 3} | SUBJECTS[name].options), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and fill:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def batch(step: int) -> torch.Tensor:
    drawn = torch.randint(NUMBER, (4, 3), generator=torch.Generator().manual_seed(step))
    return torch.cat([torch.tensor([[*ROWS]] * 4), drawn], 1)


def train(model: nn.Module, rows: slice = slice(None)) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(batch(step)[rows]) - 1).square().mean().backward()
        optimizer.step()


def shard_(model: nn.Module, name: str, way: str = "FSDP2") -> None:
    shapes = SUBJECTS[name].by_columns if way.endswith("columns") else ()
    ranks = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.children() if way.endswith("each") else ():
        fully_shard(part, mesh=ranks)
    fully_shard(model, mesh=ranks, shard_placement_fn=lambda p: Shard(1) if tuple(p.shape) in shapes else None)


def as_in_one_process(name: str, path: Path) -> None:
    for way in SUBJECTS[name].ways:
        compare(name, way, path)


def compare(name: str, way: str, path: Path) -> None:
    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    # Under DDP each rank has a base of its own, as with unseeded weights, until rank 0's is sent to all.
    alone, model = adapted(name, fill=True), adapted(name, rank if way == "DDP" else 0, fill=True)
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    base, entries = base_of(before), str(fingerprint(alone))
    if way == "DDP":
        assert not list(model.buffers()), "which DDP would send at every step"
        train(DistributedDataParallel(model), mine)
    else:
        shard_(model, name, way)
        train(model, mine)
    train(alone)
    state = whole_state(model)
    assert_same_bits(base_of(state), base)
    assert str(fingerprint(model)) == entries
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
        trained = dict(alone.named_parameters(remove_duplicate=False))[key].requires_grad
        assert trained == (not torch.equal(state[key], before[key])), key
    unmerged, weights = model(batch(9)).detach(), whole(merged_state_dict(model))
    for _ in range(3):
        merge(model)
        assert all(layer.lora.undo for layer in adapted_layers(model).values()) or name == "tied rows"
        torch.testing.assert_close(model(batch(9)), unmerged, rtol=1e-4, atol=1e-5)
        assert_same_bits(base_of(whole_state(model)), base)
        unmerge(model)
    assert_same_bits(whole_state(model), state)
    torch.testing.assert_close(model(batch(9)), unmerged, rtol=0, atol=0)
    for key, value in merged_state_dict(alone).items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)
    if "rows" in name:
        assert torch.equal(weights["emb.weight"][list(ROWS)], state["emb.lora_rows"])
    if name in ("own", "own scale", "tied rows"):  # which PEFT's folders cannot hold
        again = adapted(name)
        again.load_state_dict(whole(adapter_state_dict(model)), strict=False)
    else:
        save_adapter(model, path / way)
        dist.barrier()
        load_adapter(again := plain(name), path / way)
    torch.testing.assert_close(again(batch(9)), unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_two_ranks_train_merge_and_save_as_one_process_does(name: str, tmp_path: Path):
    world().run(as_in_one_process, name, tmp_path)


FOLLOW = ("dora", "pissa", "rows")  # start from the weight


def load_new_base() -> None:
    for name in FOLLOW:
        for trained in (False, True):
            alone, model = adapted(name), adapted(name)
            base = {key: value * 2 for key, value in base_of(alone.state_dict()).items()}
            if trained:
                train(alone)
                train(model)
            before = {key: value.clone() for key, value in adapter_state_dict(model).items()}
            shard_(model, name)
            ranks = model.emb.weight.device_mesh
            with merged(model):
                model.load_state_dict({key: distribute_tensor(v, ranks, [Shard(0)]) for key, v in base.items()})
            alone.load_state_dict(base)
            state = whole_state(model)
            assert_same_bits(base_of(state), base)
            for key, value in alone.state_dict().items():
                torch.testing.assert_close(state[key], value, rtol=2e-7, atol=0)
            if trained:
                assert_same_bits({key: state[key] for key in before}, before)
            else:
                new = plain(name)
                new.load_state_dict(base)
                torch.testing.assert_close(model(batch(1)), new(batch(1)), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_what_starts_from_the_weight_follows_a_new_base_on_shards():
    world().run(load_new_base)


def norms_of_shards() -> None:
    for number in range(8):
        dtype, dim, transposed = (torch.float32, torch.bfloat16)[number % 2], number // 2 % 2, number >= 4
        torch.manual_seed(0)
        a, b = torch.randn(2, 64).to(dtype), torch.randn(7, 2).to(dtype)
        exact = 0.5 * b.double() @ a.double()
        weight = (torch.randn(7, 64, dtype=torch.float64) * torch.tensor([1.0] * 6 + [1e-3])[:, None] - exact).to(dtype)
        wanted = (weight.double() + exact).norm(dim=1)
        shards = distribute_tensor(weight.T.contiguous() if transposed else weight, mesh(), [Shard(dim)])
        found = norms_of_weight(shards, a, b, 0.5, transposed=transposed)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_norms_of_shards_are_those_of_the_whole_weight():
    world().run(norms_of_shards)


def gather_rows() -> None:
    for count in (6, 5):
        table = torch.arange(4.0 * count).view(count, 4) + 1
        rows = [0, 2, 3, count - 1]  # the first and the last of each shard
        for placement in (Shard(0), Shard(1), Replicate()):
            assert torch.equal(rows_of(distribute_tensor(table, mesh(), [placement]), rows), table[rows])


def test_rows_at_the_ends_of_shards_are_gathered():
    world().run(gather_rows)


# --- what cannot be split ---


def split() -> None:
    for name, layer in (("dora", "up"), ("dora", "emb"), ("rows", "emb"), ("rows", "head")):
        with pytest.raises(LoRAError, match=r"(use_dora does|trained rows do) not follow a tensor parallel split"):
            parallelize_module(adapted(name), mesh(), {layer: ColwiseParallel()})
    sharded = nn.Sequential(nn.Linear(8, 6))
    fully_shard(sharded, mesh=mesh())
    with pytest.raises(LoRAError, match="is sharded already; call inject"):
        inject(sharded, LoRAConfig(r=2, init_lora_weights="pissa"))


def test_what_needs_whole_weights_refuses_split_ones():
    world().run(split)


def parallel() -> None:
    config = LoRAConfig(r=2, lora_alpha=3, init_lora_weights="pissa")
    net, alone = parallelize_module(block(config), mesh(), PLAN), block(config)
    assert net.up.lora_start_B.placements == net.up.lora_B.placements == net.up.weight.placements
    assert net.down.lora_start_A.placements == net.down.lora_A.placements == net.down.weight.placements
    for model in (net, alone):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(TENSOR_X).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(net(TENSOR_X), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
    with merged(net):
        torch.testing.assert_close(net(TENSOR_X), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
    before, after = (base_of(whole_state(each)) for each in (alone, net))
    assert_same_bits(after, before)


@pytest.mark.slow
def test_a_split_layer_that_starts_from_the_weight_trains_as_on_one_device():
    world().run(parallel)


# --- a Trainer ---


class Net(RootSharded):
    """A LightningModule around a network, sharded with it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.net = plain(name)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self(batch[0]) - 1).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)


def fit(path: Path, name: str, save: Any, epochs: int, source: Path | None = None) -> Any:
    rows = TensorDataset(torch.cat([batch(step) for step in range(3)]))
    sampler: Any = DistributedSampler(rows, dist.get_world_size(), dist.get_rank(), shuffle=False)
    loader = DataLoader(rows, batch_size=2, sampler=sampler)
    trainer = model_parallel(path, LoRACallback(save=save, seed=1, r=2, **SUBJECTS[name].options), max_epochs=epochs)
    trainer.fit(model := Net(name), loader, loader, ckpt_path=source)
    trainer.save_checkpoint(path / "a.ckpt")
    return whole_state(model), optimizer_state(trainer), model.losses


@pytest.mark.slow
@pytest.mark.parametrize(("name", "save"), [("dora", "merged"), ("tied rows", "adapter")])
def test_a_resumed_sharded_run_equals_the_uninterrupted_one(tmp_path: Path, name: str, save: str):
    state, optimizer, losses = world().run(fit, tmp_path, name, save, 4)[0]
    world().run(fit, tmp_path / "first", name, save, 2)
    for found in world().run(fit, tmp_path / "second", name, save, 4, tmp_path / "first" / "a.ckpt"):
        assert_same_bits(found[0], state)
        assert_same_bits(found[1], optimizer)
        assert found[2] == losses[-len(found[2]) :]
    load_adapter(alone := Net(name), tmp_path / "a.ckpt")
    found = dict(alone.state_dict())
    assert_same_bits({key: found[key] for key in state}, state)
    assert all(value.any() for key, value in state.items() if "lora_B" in key)
