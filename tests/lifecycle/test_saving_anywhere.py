"""A checkpoint saved at any moment is that of a run evaluated unmerged, and a run goes on from it."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from comparing import Watched, assert_as_found, base_weights, lora
from helpers import Data, Net, assert_same_tensors, make_trainer, weights

from lightning_lora import is_merged

KINDS = ["adapter", "merged", "full"]
ELSEWHERE = ("on_save_checkpoint", "on_load_checkpoint", "on_exception", "on_gpu")
CALLBACK_HOOKS = [name for name in dir(L.Callback) if name.startswith("on_") and name not in ELSEWHERE]
STEPS = ["training_step", "validation_step", "test_step", "predict_step", "configure_gradient_clipping"]
MODULE_HOOKS = [name for name in dir(L.LightningModule) if name.startswith("on_") and name not in ELSEWHERE] + STEPS
DATA_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
PLACES = [
    *((owner, hook) for owner in ("first", "last") for hook in CALLBACK_HOOKS),
    *(("module", h) for h in MODULE_HOOKS),
]

Saved = dict[tuple[str, str], list[tuple[bool, Path]]]


class Saver:
    """Saves in every hook of the module's and of a callback first and last in the list."""

    def __init__(self, path: Path, model: Net, data: Data) -> None:
        self.path, self.model, self.saved = path, model, defaultdict(list)
        self.first, self.last = L.Callback(), L.Callback()
        for owner, hook in PLACES:
            target = data if hook in DATA_HOOKS else getattr(self, owner, model)
            setattr(target, hook, functools.partial(self.save, (owner, hook), getattr(target, hook)))

    def save(self, place: tuple[str, str], original: Any, *args: Any, **kwargs: Any) -> Any:
        trainer, found = self.model.trainer, self.saved[place]
        file = self.path / f"{'-'.join(place)}-{len(found)}.ckpt"
        found.append((is_merged(self.model), file))
        trainer.save_checkpoint(file, weights_only=len(found) % 2 == 0)
        return original(*args, **kwargs)


@functools.cache
def saving_run(path: Path, merged_eval: bool, kind: str, saving: bool = True) -> tuple[Saved, Net]:
    torch.manual_seed(0)
    model, data, callback = Watched(), Data(1), lora(merged_eval=merged_eval, save=kind)
    before = base_weights(model)
    saver = Saver(path, model, data) if saving else None
    callbacks = [saver.first, callback, saver.last] if saver else [callback]
    trainer = make_trainer(path, *callbacks, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    assert_as_found(model, before)
    return saver.saved if saver else {}, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("owner", "hook"), PLACES)
def test_saving_from_any_hook(folder, owner: str, hook: str, kind: str):
    merged, _ = saving_run(folder / "merged" / kind, True, kind)
    factored, _ = saving_run(folder / "factored" / kind, False, kind)
    found, expected = merged[owner, hook], factored[owner, hook]
    assert len(found) == len(expected) > 0
    assert not any(was for was, _ in expected)
    if any(f"{stage}_{part}" in hook for stage in ("validation", "test", "predict") for part in ("step", "batch_end")):
        assert all(was for was, _ in found)
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert_same_tensors(torch.load(one, weights_only=True), torch.load(other, weights_only=True))


@pytest.mark.parametrize("merged_eval", [True, False])
def test_saving_changes_nothing(folder, merged_eval: bool):
    _, model = saving_run(folder / ("merged" if merged_eval else "factored") / "full", merged_eval, "full")
    _, other = saving_run(folder / "unsaved", merged_eval, "full", saving=False)
    assert model.seen == other.seen
    assert_same_tensors(weights(model), weights(other))
