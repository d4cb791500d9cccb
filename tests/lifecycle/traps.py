"""What the tests of traps share: a damage is how far a number is from the right one, or 1 where something fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from comparing import TARGETS
from helpers import Data, Net, make_trainer

Make = Callable[..., L.Callback]
Damage = Callable[[Make, Path], float]
OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS}
RANDOM = {"init_lora_weights": False}
RIGHT, WRONG = 1e-5, 1e-3


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


def fit(path: Path, model: Net, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(path, *callbacks, **{"max_epochs": 3} | options)
    trainer.fit(model, Data())
    return trainer


def fails(act: Callable[[], Any], *errors: type[Exception]) -> float:
    try:
        act()
    except errors:
        return 1.0
    return 0.0


def check(damage: Damage, naive: Make, ours: Make, path: Path) -> None:
    """The trap does harm to the callback one writes first, so that it is one, and none to ours."""
    assert damage(ours, path / "ours") <= RIGHT
    assert damage(naive, path / "naive") > WRONG
