"""A thousand epochs of one step and a merged validation in bfloat16: no drift, no growth."""

from __future__ import annotations

import gc
import importlib
import os
from typing import Any

import pytest
import torch

from support.runs.training import Data, make_trainer
from support.runs.with_callback import At, Watched, assert_as_found, base_weights, lora_with_effect

EPOCHS = 1000


class Wide(Watched):
    """Notes little, so that its notes do not grow, and takes small steps."""

    def __init__(self) -> None:
        super().__init__(width=128)

    def note(self, stage: str, batch: Any) -> torch.Tensor:
        del self.seen[2:]
        return super().note(stage, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def live_tensors() -> tuple[int, int]:
    """How many there are, and how many bytes they hold."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), sum(tensor.nbytes for tensor in found)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_thousand_epochs_of_merged_validation_neither_drift_nor_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("lightning_lora.model.merging"), "COPY_BUDGET", 0
    )  # keep values, as a large model
    model, base, measured = Wide(), {}, {}
    changes: list[torch.Tensor] = []

    def measure(trainer: Any, module: Any) -> None:
        measured[trainer.current_epoch] = (*live_tensors(), resident_bytes())
        changes.append(module.head.lora_B.detach().clone())

    watches = [
        At("on_fit_start", lambda trainer, module: base.update(base_weights(module))),
        At("on_validation_end", measure, lambda trainer: trainer.current_epoch in (99, EPOCHS - 1)),
    ]
    options = {"precision": "bf16-true", "max_epochs": EPOCHS, "limit_train_batches": 1, "limit_val_batches": 1}
    make_trainer(tmp_path, lora_with_effect(), *watches, **options).fit(model, Data(1))
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    assert_as_found(model, base)
    assert [stage for stage, *_ in model.seen] == ["train", "validation", "validation"]
    assert model.seen[1][1]
    assert not torch.equal(changes[0], changes[1]), "it had stopped training"
    (count, held, resident), (last_count, last_held, last_resident) = measured[99], measured[EPOCHS - 1]
    assert (last_count, last_held) == (count + 1, held + changes[0].nbytes)  # the clone in `changes`
    assert last_resident - resident < 2**23  # a copy of the base in each epoch would be 31 MB
