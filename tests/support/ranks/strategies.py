"""One run in every strategy: it is trained, saved, resumed, evaluated and broken on the ranks of a world.

A `Strategy` names how. `columns_on_ranks` does all of it in one call, and gives what test_strategies_table.py judges.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
    save_merged,
    unmerge,
)
from support.ranks.deepspeed import zero
from support.ranks.fsdp1 import fsdp1
from support.ranks.sharded import (
    BATCHES,
    DEVICE,
    HIDDEN,
    TARGETS,
    Plain,
    Sharded,
    loader,
    make_trainer,
    model_parallel,
    whole_state,
)

EPOCHS = 3
FIRST, LAST = "epoch=1.ckpt", "epoch=2.ckpt"  # what is resumed, and what is read
BREAKS_IN = 1  # the epoch of a fault
FAULTS = ("exception", "a loss", "a weight")
SCALING = 2.0
OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS}
OF_EXPERTS: dict[str, Any] = OPTIONS | {"target_modules": ["0", "4"], "target_parameters": ["stack"]}
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Refused:
    """What a LoRAError said before training began."""

    message: str


@dataclass
class Run:
    """What a fit gave to a rank.

    Attributes:
        losses: of each validation.
        merged: whether the model was merged, in each batch of a validation.
        error: of the exception that ended it.
        said: warnings of the package.
    """

    losses: list[float]
    merged: list[bool]
    state: State
    error: str = ""
    said: list[str] = field(default_factory=list)


# --- models ---


class Watched(Plain):
    """Notes whether it is merged in validation, and breaks in the second epoch if it is told to.

    Attributes:
        fault: "exception" inside the merged forward of each rank, or not a number: "a loss" of the first rank, or what
            it holds of "a weight".
    """

    fault = ""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.merged: list[bool] = []

    def breaks(self, fault: str) -> bool:
        return self.fault == fault and self.trainer.current_epoch == BREAKS_IN

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.breaks("a loss") and rank() == 0 else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.breaks("a weight") and batch_idx == BATCHES - 1:
            spoil_(self.get_parameter("net.0.lora_B"))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.merged.append(is_merged(self))
        if self.breaks("exception"):
            self.net[2].register_forward_hook(lambda *args: 1 / 0)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.merged.append(is_merged(self))
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


class OfFSDP2(Watched, Sharded):
    """Each layer and the rest by fully_shard."""


class Experts(nn.Module):
    """The weights of four experts in one parameter, which fully_shard divides by experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3)) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.stack).tanh().sum(1)


class OfExperts(Watched):
    """Has experts in the place of a layer."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.net[2] = Experts()


class ExpertsOfFSDP2(OfExperts, Sharded):
    """The same by fully_shard."""


class OfHSDP(Watched):
    """The same in two groups of ranks, which hold the same shards."""

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        shape = (2, dist.get_world_size() // 2)
        mesh = init_device_mesh(DEVICE, shape, mesh_dim_names=("replicate", "shard"))
        for part in (self.net[0], self.net[2], self.net[4], self):
            fully_shard(part, mesh=mesh)


class OfTensorParallel(Watched):
    """Two layers over two ranks, and all of it by fully_shard where there are more ranks."""

    def configure_model(self) -> None:
        if isinstance(self.net[0].weight, DTensor):
            return
        assert self.device_mesh is not None
        plan = {"net.0": ColwiseParallel(use_local_output=False), "net.2": RowwiseParallel()}
        parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
        if self.device_mesh["data_parallel"].size() > 1:
            for part in (self.net[4], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def spoil_(factor: torch.Tensor) -> None:
    """Make a factor not a number: the first rank's shard of it, or the whole where each rank holds it."""
    mine = factor.to_local() if isinstance(factor, DTensor) else getattr(factor, "ds_tensor", None)
    if mine is None:
        factor.fill_(math.nan)
    elif rank() == 0:
        mine.fill_(math.nan)


def import_package(name: str) -> None:
    """Its import takes a while, which is no part of a run's time."""
    __import__(name)


# --- strategies ---


@dataclass(frozen=True)
class Strategy(ABC):
    """A line of the table.

    Attributes:
        ranks: how many processes train.
        others: how many processes resume what these have saved.
        package: which must be installed.
        experts: a stack of experts is adapted, too.
        restores: an exception inside a forward leaves a model that can be unmerged, and not one inside that forward.
    """

    label: str
    ranks: int
    others: int
    package: str = field(default="", kw_only=True)
    experts: bool = field(default=False, kw_only=True)
    restores: bool = field(default=True, kw_only=True)

    def plain(self) -> Plain:
        """Return the model as it is before it is adapted, in one process."""
        return OfExperts() if self.experts else Plain()

    @abstractmethod
    def fit(self, path: Path, source: Path | None, seed: int, fault: str) -> tuple[nn.Module, Run]:
        """Train, and save a checkpoint of each epoch. The seed is of the adapter alone."""

    @abstractmethod
    def evaluate(self, path: Path, source: Path) -> Run:
        """Validate a new model that takes its values from a file."""

    @abstractmethod
    def load(self, source: Path) -> State:
        """The state of a new model in one process, with what a file holds."""

    @abstractmethod
    def content(self, source: Path) -> State:
        """All tensors that a checkpoint holds of the model."""

    def parts(self) -> tuple[int, int]:
        """How many parts a batch has, and which of them is this rank's."""
        return ranks(), rank()

    def data(self) -> tuple[Any, Any]:
        return loader(*self.parts()), loader(*self.parts(), 6)


def gathered(trainer: Any) -> State:
    return whole_state(trainer.lightning_module)


@dataclass(frozen=True)
class WithTrainer(Strategy):
    """A strategy of Lightning's Trainer.

    Attributes:
        model: builds the model.
        trainer: makes a Trainer on all ranks of this world, from a folder, callbacks and the Trainer's options.
        tensor: ranks that share a batch.
        state: gathers the state of a Trainer's model, by torch or by the strategy's package alone.
    """

    model: Callable[[], Watched]
    trainer: Callable[..., L.Trainer]
    tensor: int = 1
    state: Callable[[Any], State] = gathered

    def parts(self) -> tuple[int, int]:
        return ranks() // self.tensor, rank() // self.tensor

    def start(self, path: Path, source: Path | None, **options: Any) -> L.Trainer:
        """A Trainer; one that loads a checkpoint has the options from there."""
        saves = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        lora = LoRACallback(**({} if source else OF_EXPERTS if self.experts else OPTIONS))
        return self.trainer(path, lora, saves, enable_checkpointing=True, **options)

    def fit(self, path: Path, source: Path | None, seed: int, fault: str) -> tuple[nn.Module, Run]:
        torch.manual_seed(seed)
        model = self.model()
        model.fault, error = fault, ""
        trainer = self.start(path, source, max_epochs=BREAKS_IN + 1 if fault else EPOCHS)
        with warnings_of_ours() as said:
            try:
                trainer.fit(model, *self.data(), ckpt_path=source)
            except ZeroDivisionError as broken:
                error = str(broken)
        state = self.state(trainer) if self.restores or not error else {}
        return model, Run(model.losses, model.merged, state, error, said)

    def evaluate(self, path: Path, source: Path) -> Run:
        torch.manual_seed(9)
        model, trainer = self.model(), self.start(path, source)
        trainer.validate(model, self.data()[1], ckpt_path=source, verbose=False)
        return Run(model.losses, model.merged, self.state(trainer))

    def load(self, source: Path) -> State:
        return whole_state(load_from_checkpoint(type(self.plain()), source))

    def content(self, source: Path) -> State:
        return tensors_in(source)


def on_one_device(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer on one device; with ddp where there are several ranks."""
    strategy = "ddp" if ranks() > 1 else "auto"
    return make_trainer(path, *callbacks, devices=ranks(), strategy=strategy, **options)


def by_tensor(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return model_parallel(path, *callbacks, tensor=2, **options)


def stage_1(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return zero(path, *callbacks, stage=1, **options)


def stage_2(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return zero(path, *callbacks, stage=2, **options)


def stage_3(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Also small parameters are divided, which DeepSpeed keeps whole by default."""
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    more = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return zero(path, *callbacks, stage=3, options={"config": config | more}, **options)


def fsdp1_by_layers(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A unit for each layer, and one for the rest."""
    return fsdp1(path, *callbacks, options={"auto_wrap_policy": {nn.Linear}}, **options)


def tensors_in(path: Path) -> State:
    """Read all tensors of a state dict by torch alone."""
    found: State = torch.load(path, weights_only=True)["state_dict"]
    return found


# --- Fabric ---


def shard(model: Any, mesh: Any) -> Any:
    for part in (*(model.net[int(name)] for name in TARGETS), model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


@dataclass(frozen=True)
class WithFabric(Strategy):
    """Fabric with ddp or FSDP2, in a loop as a user writes it.

    Attributes:
        sharded: whether by FSDP2.
    """

    sharded: bool

    def start(self, seed: int) -> tuple[Fabric, Any, Any]:
        """Fabric on all ranks of this world, the adapted model and its optimizer."""
        fsdp2 = ModelParallelStrategy(shard, ranks(), 1, save_distributed_checkpoint=False)
        fabric = Fabric(accelerator=DEVICE, devices=ranks(), strategy=fsdp2 if self.sharded else "ddp")
        fabric.launch()
        torch.manual_seed(seed)
        model = Plain()
        inject(model, LoRAConfig(**OPTIONS))
        model = fabric.setup(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
        return fabric, model, fabric.setup_optimizers(optimizer)

    def fit(self, path: Path, source: Path | None, seed: int, fault: str) -> tuple[nn.Module, Run]:
        path.mkdir(parents=True, exist_ok=True)
        fabric, model, optimizer = self.start(seed)
        state = {"model": model, "optimizer": optimizer, "epoch": 0}
        if source is not None:
            fabric.load(source, state, strict=False)
        run, names = Run([], [], {}), set(adapter_state_dict(model))
        for epoch in range(state["epoch"], BREAKS_IN + 1 if fault else EPOCHS):
            breaks = fault if epoch == BREAKS_IN else ""
            for x, y in self.data()[0]:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                fabric.backward(loss * math.nan if breaks == "a loss" and rank() == 0 else loss)
                optimizer.step()
            if breaks == "a weight":
                spoil_(model.get_parameter("net.0.lora_B"))
            if breaks == "exception":
                model.net[2].register_forward_hook(lambda *args: 1 / 0)
            try:
                self.validate(fabric, model, run)
            except ZeroDivisionError as broken:
                run.error = str(broken)
            state["epoch"] = epoch + 1
            if source is None:
                fabric.save(path / f"epoch={epoch}.ckpt", state, filter={"model": lambda name, _: name in names})
        run.state = whole_state(model)
        return model, run

    def validate(self, fabric: Fabric, model: Any, run: Run) -> None:
        """Evaluate merged, or unmerged where merging says that it cannot be."""
        losses: list[Any] = []
        with torch.no_grad(), merged_if_finite(model, run.said):
            for x, y in self.data()[1]:
                run.merged.append(is_merged(model))
                losses.append(fabric.all_reduce(F.cross_entropy(model(x), y)))
        run.losses.append(float(sum(losses) / len(losses)))

    def evaluate(self, path: Path, source: Path) -> Run:
        fabric, model, _ = self.start(9)
        fabric.load(source, {"model": model}, strict=False)
        run = Run([], [], {})
        self.validate(fabric, model, run)
        run.state = whole_state(model)
        return run

    def load(self, source: Path) -> State:
        inject(model := Plain(), LoRAConfig(**OPTIONS))
        load_adapter(model, source)
        return whole_state(model)

    def content(self, source: Path) -> State:
        found: State = torch.load(source, weights_only=True)["model"]
        return found


@contextmanager
def merged_if_finite(model: nn.Module, said: list[str]) -> Iterator[None]:
    """Merge if it is possible; unmerge in any case."""
    try:
        merge(model)
    except LoRAError as error:
        said.append(str(error))
    try:
        yield
    finally:
        unmerge(model)


# --- all columns ---


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """Collect the package's warnings, which are no errors inside."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "LoRACallback")
        yield said
    said += [message for each in caught if (message := str(each.message)).startswith("LoRACallback")]


def columns_on_ranks(row: Strategy, path: Path) -> dict[str, Any]:
    """Go through all columns of a line but those that another number of ranks or one process does."""
    try:
        model, run = row.fit(path / "run", None, 0, "")
    except LoRAError as error:
        return {"fit": Refused(str(error))}
    found: dict[str, Any] = {"fit": run}
    save_adapter(model, path / "adapter")
    save_merged(model, path / "merged")
    found["evaluate"] = row.evaluate(path / "run", path / "run" / LAST)
    found["resume"] = resume(row, path)
    for fault in FAULTS:
        found[fault] = broken(row, path / fault, fault)
    return found


def resume(row: Strategy, path: Path) -> Run:
    """Go on from the second epoch, where the adapter starts from another seed."""
    return row.fit(path / "run", path / "run" / FIRST, 5, "")[1]


def broken(row: Strategy, path: Path, fault: str) -> Run:
    model, run = row.fit(path, None, 0, fault)
    assert not is_merged(model) or not row.restores
    return run
