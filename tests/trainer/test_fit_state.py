"""What the callbacks keep of each module: from setup to teardown, of none that is gone, and not in copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRACallback, LoRAMonitor, is_merged
from support.runs import At, BrokenError, lora_with_effect
from support.training import Data, Net, make_trainer


def trainer(path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return make_trainer(path, *callbacks, logger=CSVLogger(path), **options)


def kept(callback: LoRACallback, monitor: LoRAMonitor) -> list[int]:
    return [len(callback._states), len(monitor._last.snapshots)]


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_state_is_there_in_a_run_and_gone_after_it(tmp_path: Path, stage: str):
    callback, monitor = lora_with_effect(), LoRAMonitor(1)
    hook = "on_train_batch_end" if stage == "fit" else f"on_{stage.replace('validate', 'validation')}_batch_end"
    seen: list[list[int]] = []
    look = At(hook, lambda trainer, module: seen.append(kept(callback, monitor)))
    getattr(trainer(tmp_path, callback, monitor, look), stage)(Net(), Data(1))
    assert seen == [[1, 3 if stage == "fit" else 0]]
    assert kept(callback, monitor) == [0, 0]


class Breaks(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise BrokenError


def test_state_is_gone_after_an_exception(tmp_path: Path):
    callback = lora_with_effect()
    with pytest.raises(BrokenError):
        trainer(tmp_path, callback).fit(model := Breaks(), Data(1))
    assert len(callback._states) == 0
    assert not is_merged(model)


def test_callback_keeps_no_model_alive_though_its_hooks_are_called_without_an_end(tmp_path: Path):
    callback, model = lora_with_effect(), Net()
    with_model = trainer(tmp_path, callback)
    callback.setup(with_model, model, "fit")
    for hook in ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_start"):
        getattr(callback, hook)(with_model, model)
    assert is_merged(model)
    assert len(callback._states) == 1
    ended = weakref.ref(model)
    del model
    gc.collect()
    assert ended() is None
    assert len(callback._states) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_made_in_a_run_have_its_options_and_nothing_of_its_state(tmp_path: Path, copied: Any):
    callback, monitor = lora_with_effect(seed=3, merged_eval=False), LoRAMonitor(1, plots=False)
    copies: list[Any] = []
    look = At("on_train_batch_end", lambda trainer, module: copies.extend((copied(callback), copied(monitor))))
    trainer(tmp_path, callback, monitor, look).fit(Net(), Data(1))
    assert [repr(each) for each in copies] == [repr(callback), repr(monitor)]
    assert kept(*copies) == [0, 0]
    trainer(tmp_path, *copies).fit(model := Net(), Data(1))
    assert model.head.lora_B.abs().sum() > 0
