"""A sharded run draws the pictures of a run on one device. So does the command, from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from lightning_lora import LoRACallback, LoRAMonitor
from support.ranks.fsdp1 import fsdp1
from support.ranks.processes import world
from support.ranks.sharded import TARGETS, Plain, Sharded, data, loader, make_trainer, model_parallel

pytestmark = pytest.mark.slow


class TensorBoardLogger(Logger):
    """Stands in for Lightning's."""

    name, version = "board", 0

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[Any] = []
        self.experiment: Any = self

    def add_figure(self, tag: str, figure: Any, global_step: int, close: bool = True) -> None:
        self.figures.append(figure)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass


def drawn(figure: Any) -> list[float]:
    return [float(value) for axes in figure.axes for line in axes.lines for value in line.get_ydata()]


def fitted(path: Path, strategy: str) -> list[list[float]]:
    """What the lines of each picture that was logged show, on rank 0."""
    board, monitor = TensorBoardLogger(), LoRAMonitor(every_n_steps=0)
    callback = LoRACallback(r=2, target_modules=TARGETS)
    options = {"logger": board, "max_epochs": 1}
    make = {"": make_trainer, "fsdp1": fsdp1, "fsdp2": model_parallel}[strategy]
    model = Sharded() if strategy == "fsdp2" else Plain()
    trainer = make(path, callback, monitor, **options)
    trainer.fit(model, *(data() if strategy else (loader(), loader(seed=6))))
    return [drawn(figure) for figure in board.figures]


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_pictures_of_a_sharded_run_are_those_of_one_device(tmp_path: Path, strategy: str):
    expected = fitted(tmp_path / "one", "")
    first, *others = world().run(fitted, tmp_path / "ranks", strategy)
    assert not any(others)  # the first rank alone draws
    assert len(first) == len(expected) == 2
    for values, wanted in zip(first, expected, strict=True):
        assert values == pytest.approx(wanted, rel=1e-3)
