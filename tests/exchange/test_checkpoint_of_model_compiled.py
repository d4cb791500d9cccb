"""A submodule compiled in __init__: checkpoints have the module's own names, with the wrapper's segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, load_from_checkpoint, merge_and_unload, save_adapter
from support.expected_weights import merge_and_check
from support.lightning_versions import PLAIN_TYPES_ONLY
from support.recorders import Recorder
from support.runs import lora
from support.training import Data, Net, assert_same_tensors, make_trainer, outputs

KINDS = ("adapter", "merged", "full")


class Compiled(Net):
    """As programs write it; nothing is compiled before it runs, and here it runs without."""

    def prepare(self) -> None:
        super().prepare()
        self.body = torch.compile(self.body, backend=Recorder())


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def saved(path: Path, kind: str, cls: type[Net] = Compiled) -> tuple[Net, Path]:
    model = cls(width=7, seed=4)
    torch.manual_seed(0)
    trainer = make_trainer(path, lora(save=kind))
    trainer.fit(model, Data())
    trainer.save_checkpoint(path / "saved.ckpt")
    return model, path / "saved.ckpt"


def test_merged_checkpoint_is_read_by_the_plain_class(tmp_path):
    model, file = saved(tmp_path, "merged")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert list(state) == list(Compiled().state_dict())
    plain = Compiled.load_from_checkpoint(file, strict=True, **PLAIN_TYPES_ONLY)
    merge_and_unload(model)
    assert_same_tensors(dict(plain.state_dict()), dict(model.state_dict()))
    make_trainer(tmp_path).validate(Compiled(width=7), Data(), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY)


def test_full_checkpoint_has_the_modules_own_names(tmp_path):
    model, file = saved(tmp_path, "full")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert list(state) == list(model.state_dict())
    with pytest.warns(UserWarning, match="Found keys that are not in the model state dict") as told:
        plain = Compiled.load_from_checkpoint(file, strict=False, **PLAIN_TYPES_ONLY)
    assert str(told[0].message).count("lora_") == 6, "the factors and nothing else"
    assert_same_tensors(dict(plain.state_dict()), {name: state[name] for name in plain.state_dict()})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_a_submodule_compiled_in_init_loads_and_resumes(tmp_path, kind: str):
    model, file = saved(tmp_path, kind)
    for cls in (Compiled, Net):
        load_adapter(loaded := cls(width=7, seed=4), file)
        assert torch.equal(outputs(loaded), outputs(model))
        assert torch.equal(outputs(load_from_checkpoint(cls, file)), outputs(model))
        ends: list[Any] = []
        for source in (file, saved(tmp_path / "plain", kind, Net)[1]):
            resumed = cls(width=7, seed=4)
            torch.manual_seed(0)
            trainer = make_trainer(tmp_path, lora(save=kind), max_epochs=2)
            trainer.fit(resumed, Data(), ckpt_path=source, **PLAIN_TYPES_ONLY)
            ends.append(dict(resumed.state_dict()))
        assert_same_tensors(*ends)


def test_command_merges_into_a_checkpoint_with_the_segments_of_a_wrapper(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(Compiled(width=7, seed=4), Data())
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    model = Compiled.load_from_checkpoint(tmp_path / "base.ckpt", **PLAIN_TYPES_ONLY)
    make_trainer(tmp_path, lora()).fit(model, Data())
    save_adapter(model, tmp_path / "adapter")
    merge_and_check(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "merged.ckpt")
    merged = Compiled.load_from_checkpoint(tmp_path / "merged.ckpt", strict=True, **PLAIN_TYPES_ONLY)
    merge_and_unload(model)
    assert_same_tensors(dict(merged.state_dict()), dict(model.state_dict()))
