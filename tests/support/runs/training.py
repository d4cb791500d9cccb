"""LightningModules, data, Trainers and comparisons of tensors. As in a user's program, nothing uses the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, BATCH = 6, 3, 8


class Net(L.LightningModule):
    """A small MLP with BatchNorm. Its weights depend only on `seed`. Its parts to adapt are `body` and `head`."""

    def __init__(self, width: int = 8, seed: int = 1, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen: list[Any] = []
        self.prepare()

    def prepare(self) -> None:
        self.build_body()
        self.build_head()

    def build_body(self) -> None:
        width = self.hparams["width"]
        with own_random_stream(self.hparams["seed"]):
            self.body = nn.Sequential(
                nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )

    def build_head(self) -> None:
        with own_random_stream(self.hparams["seed"] + 1000):
            self.head = nn.Linear(self.hparams["width"], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class BuiltInSetup(Net):
    """Builds its head in setup, once."""

    def prepare(self) -> None:
        self.build_body()

    def setup(self, stage: str) -> None:
        if not hasattr(self, "head"):
            self.build_head()


class RebuiltInSetup(Net):
    """Builds everything again in setup of each stage, as many programs that load a pretrained model do."""

    def prepare(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        super().prepare()


class BuiltInConfigureModel(Net):
    """Builds everything in configure_model, once."""

    def prepare(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            super().prepare()


class Data(L.LightningDataModule):
    """A fixed classification task. With `shuffle` the order of training data comes from the global random stream."""

    def __init__(self, batches: int = 3, shuffle: bool = False) -> None:
        super().__init__()
        self.batches, self.shuffle = batches, shuffle

    def loader(self, seed: int, shuffle: bool = False) -> DataLoader[Any]:
        with own_random_stream(seed):
            x = torch.randn(BATCH * self.batches, FEATURES)
            y = torch.randint(CLASSES, (BATCH * self.batches,))
        return DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(1, self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)  # the validation data, so that the two losses can be compared

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)


class TwoLoaders(Data):
    """Two of each evaluation loader, with different data."""

    def val_dataloader(self) -> Any:
        return [self.loader(2), self.loader(4)]

    test_dataloader = predict_dataloader = val_dataloader


class SizedData(Data):
    """Data with the attribute that a batch-size finder writes to."""

    batch_size = 2

    def loader(self, seed: int, shuffle: bool = False) -> Any:
        return DataLoader(super().loader(seed).dataset, batch_size=self.batch_size)


@contextmanager
def own_random_stream(seed: int) -> Iterator[None]:
    """Run the block with a random stream of its own. The stream of the test stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_trainer(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer on one CPU that writes below `path` and prints nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    short: dict[str, Any] = {
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": saves,
    }
    place: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "default_root_dir": path}
    return L.Trainer(callbacks=list(callbacks), **quiet | short | place | options)


def fit_model(
    path: Path,
    model: L.LightningModule,
    *callbacks: L.Callback,
    data: Any = None,
    ckpt_path: Path | None = None,
    saved: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Fit a model by a Trainer of make_trainer, and save a checkpoint of the end in the file `saved`.

    Args:
        data: a data module, a loader, or a pair of loaders for training and validation; Data() by default.
    """
    trainer = make_trainer(path, *callbacks, **options)
    training, validation = data if isinstance(data, tuple) else (data, None)
    trainer.fit(model, Data() if training is None else training, validation, ckpt_path=ckpt_path)
    if saved is not None:
        trainer.save_checkpoint(saved)
    return trainer


def inputs() -> torch.Tensor:
    with own_random_stream(3):
        return torch.randn(16, FEATURES)


def outputs(model: nn.Module) -> torch.Tensor:
    """The outputs of a model in evaluation mode. Its mode is restored."""
    training = model.training
    with torch.no_grad():
        result: torch.Tensor = model.eval()(inputs())
    model.train(training)
    return result


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the tensors in a state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def seen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a forward reads, by state dict name. Inside disable_adapter they are those before training."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nested structure, with its place."""
    if isinstance(value, torch.Tensor):
        yield path, value
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value if is_list(value) else ()):
        yield from tensors(item, f"{path}/{key}")


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def assert_same_tensors(found: Any, expected: Any, path: str = "") -> None:
    """Check that tensors in two nested structures are the same bit for bit, and all other values equal."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same_tensors(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_tensors(one, other, f"{path}/{i}")
    else:
        assert found == expected, path
