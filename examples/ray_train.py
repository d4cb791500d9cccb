"""Ray Train: two workers train an adapter, one of them is killed, and the run goes on from the last checkpoint.

pip install -e ".[ray]"
python examples/ray_train.py --kill-in-epoch 3

A network that reads digits learns to read them mirrored, once without and once with the kill. The workers are of this
machine's CPU; `--fsdp2` shards the network over them. On a cluster see examples/guides.md.
"""

import argparse
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset

from lightning_lora import LoRACallback, load_from_checkpoint
from small_models import digits, digits_mlp

try:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback
    from ray.train.torch import TorchTrainer, get_device
except ImportError as error:
    raise SystemExit('ray_train.py: Ray Train is not installed; run pip install -e ".[ray]".') from error

RUNS = Path(__file__).with_name("runs") / "ray_train"


class Digits(L.LightningModule):
    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = digits_mlp()

    def configure_model(self) -> None:
        """Shard layer by layer where the strategy is FSDP2; the callback has adapted the layers before."""
        if self.device_mesh is None or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        for part in (*(layer for layer in self.network if isinstance(layer, nn.Linear)), self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        scores = self(images)
        self.log("loss", F.cross_entropy(scores, labels), sync_dist=True)
        self.log("accuracy", (scores.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class RayFSDP2Strategy(ModelParallelStrategy):
    """FSDP2 in the workers of Ray, each of which sees its own device alone."""

    @property
    def root_device(self) -> torch.device:
        device: torch.device = get_device()
        return device


class Killed(L.Callback):
    """Kills the second worker at the second batch of an epoch, as a machine that breaks down would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            os.kill(os.getpid(), signal.SIGKILL)


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """400 mirrored digits to train on, 500 to validate on."""
    data = digits(mirrored=True)
    return (
        DataLoader(Subset(data, range(400)), batch_size=20, shuffle=True),
        DataLoader(Subset(data, range(400, 900)), batch_size=50),
    )


def train(options: dict[str, Any]) -> None:
    """What each worker runs, at the start and again after a failure."""
    L.seed_everything(0)
    last = ray.train.get_checkpoint()  # None at the start
    callbacks = [LoRACallback(r=4, lora_alpha=4), RayTrainReportCallback()]
    if last is None and options["kill_in_epoch"] is not None:
        callbacks.append(Killed(options["kill_in_epoch"]))
    fsdp2 = RayFSDP2Strategy(ray.train.get_context().get_world_size(), 1, save_distributed_checkpoint=False)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=fsdp2 if options["fsdp2"] else RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        max_epochs=6,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,  # RayTrainReportCallback saves, and Ray keeps the files
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), *loaders(), ckpt_path=last and Path(last.to_directory(), "checkpoint.ckpt"))


def run(name: str, **options: Any) -> tuple[dict[str, float], Path]:
    """Train with two workers that may fail once. Return the last metrics and the last checkpoint."""
    shutil.rmtree(RUNS / name, ignore_errors=True)  # Ray would go on with it
    result = TorchTrainer(
        train,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=name, storage_path=str(RUNS), failure_config=FailureConfig(max_failures=1)),
    ).fit()
    return result.metrics, Path(result.checkpoint.to_directory(), "checkpoint.ckpt")


def show(title: str, metrics: dict[str, float]) -> None:
    print(f"{title:<10} loss {metrics['loss']!r}, accuracy {metrics['accuracy']:.2f} after {metrics['step']} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kill-in-epoch", type=int)
    parser.add_argument("--fsdp2", action="store_true")
    arguments = parser.parse_args()
    digits_mlp()  # once, before two workers read it
    ray.init(include_dashboard=False, log_to_driver=False)
    metrics, path = run("whole", kill_in_epoch=None, fsdp2=arguments.fsdp2)
    show("whole:", metrics)
    if arguments.kill_in_epoch is not None:
        resumed_metrics, resumed_path = run("killed", **vars(arguments))
        show("resumed:", resumed_metrics)
        whole, resumed = (torch.load(each, weights_only=True)["state_dict"] for each in (path, resumed_path))
        print(f"the same adapter in every bit: {all(torch.equal(whole[name], resumed[name]) for name in whole)}")
    print(f"the checkpoint: {path.stat().st_size:,} bytes")
    model = load_from_checkpoint(Digits, path)
    images, labels = loaders()[1].dataset[:]
    print(f"loaded in one process: accuracy {(model(images).argmax(1) == labels).float().mean():.2f}")
