"""A fit on all ranks of a world, the same fit on one device, and the comparison of both, where it is resumed too."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora import LoRACallback, is_merged
from support.ranks.processes import world
from support.ranks.sharded import TARGETS, Plain, data, loader, make_trainer, whole_state
from support.ranks.sharded_adapters import assert_same_bits

State = dict[str, torch.Tensor]


@dataclass
class Case:
    """A fit by a strategy, of which a subclass knows how its Trainer is made and its model is looked at.

    Attributes:
        strategy: its options.
        lora: options of the adapter.
        trainer: options of the Trainer.
    """

    strategy: dict[str, Any] = field(default_factory=dict)
    model: type[Plain] = Plain
    lora: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def on_ranks(self, path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        """Return a Trainer on all ranks of this world."""
        raise NotImplementedError

    def gathered(self, trainer: Any) -> State:
        """Return the state of its model, by torch or by the strategy's package alone."""
        raise NotImplementedError

    def after_fit(self, model: Plain) -> None:
        """Do what a GPU would have done by now."""

    def build(self, seed: int) -> tuple[Any, LoRACallback]:
        torch.manual_seed(seed)
        options: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
        return self.model(), LoRACallback(**options | self.lora)


@dataclass
class Run:
    """What a fit gave: the state, the loss of each validation, the checkpoint and the names of frozen parameters."""

    state: State
    losses: list[float]
    file: Path
    frozen: list[str] = field(default_factory=list)


def fit(case: Case, path: Path, epochs: int, source: Path | None = None, seed: int = 0, alone: bool = False) -> Run:
    """Train on all ranks, or in one process, and save. The seed is of what is not in the source."""
    model, callback = case.build(seed)
    warnings.filterwarnings("ignore", "lightning_lora: the components of net.0")
    trainer = (make_trainer if alone else case.on_ranks)(path, callback, max_epochs=epochs, **case.trainer)
    training, validation = (loader(), loader(seed=6)) if alone else data()
    trainer.fit(model, training, validation, ckpt_path=source)
    assert not is_merged(model)
    case.after_fit(model)
    trainer.save_checkpoint(path / "all.ckpt")
    trainer.save_checkpoint(path / "weights.ckpt", weights_only=True)
    state = whole_state(model) if alone else case.gathered(trainer)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen = [name.replace("_fsdp_wrapped_module.", "") for name in frozen if "lora_" not in name]
    return Run(state, list(model.losses), path / "all.ckpt", frozen)


def alone(case: Case, path: Path, epochs: int, source: Path | None = None, seed: int = 0) -> Run:
    return fit(case, path, epochs, source, seed, alone=True)


def assert_close(found: Run, expected: Run, epochs: int) -> None:
    """The last epochs, merged in validation, and all values at the end."""
    assert found.losses == pytest.approx(expected.losses[-epochs:], abs=1e-6)
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        torch.testing.assert_close(found.state[name], value, atol=2e-6, rtol=0)


def assert_run_equals_one_device_and_is_resumed(case: Case, path: Path) -> None:
    """By ranks and by one device, exactly; and the base has its bits."""
    expected, base = alone(case, path / "alone", 3), case.build(0)[0].state_dict()
    whole = world().run(fit, case, path / "whole", 3)
    for found in whole:
        assert_close(found, expected, 3)
        assert len(found.frozen) >= 3
        assert_same_bits(*({name: state[name] for name in found.frozen} for state in (found.state, base)))
    first = world().run(fit, case, path / "first", 2)[0].file
    for found in world().run(fit, case, path / "second", 3, first, 5):
        assert_same_bits(found.state, whole[0].state)
        assert found.losses == whole[0].losses[2:]
    assert_close(alone(case, path / "one", 3, first, 5), expected, 1)
