"""LoRAWeightAveraging on two ranks: as Lightning's own average on one device, under each strategy, resumed too."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, LoRAWeightAveraging, load_from_checkpoint
from support.ranks.deepspeed import gathered_by_deepspeed
from support.ranks.fsdp1 import gathered_by_fsdp1
from support.ranks.processes import world
from support.ranks.sharded import Plain, RootSharded, Sharded, data, loader, make_trainer, model_parallel
from support.ranks.sharded_adapters import assert_same_bits
from support.ranks.strategies import fsdp1_by_layers, gathered, import_package, on_one_device, stage_1, stage_3
from support.runs.lightning_versions import EMAWeightAveraging, weight_averaging

EPOCHS, DECAY = 3, 0.8
OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "2"], "modules_to_save": ["4"]}
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")
State = dict[str, torch.Tensor]


class Gathered(Sharded):
    """Its layers stay gathered after a forward, and so does a validation's."""

    options = {"reshard_after_forward": False}  # noqa: RUF012


WAYS: dict[str, tuple[type[Plain], Callable[..., L.Trainer], Callable[[Any], State]]] = {
    "ddp": (Plain, on_one_device, gathered),
    "FSDP2": (Sharded, model_parallel, gathered),
    "FSDP2, gathered": (Gathered, model_parallel, gathered),
    "FSDP2, at the root": (RootSharded, model_parallel, gathered),
    "FSDP1": (Plain, fsdp1_by_layers, gathered_by_fsdp1),
    "DeepSpeed, stage 1": (Plain, stage_1, gathered_by_deepspeed),
    "DeepSpeed, stage 3": (Plain, stage_3, gathered_by_deepspeed),
}


def fit(name: str, path: Path, kind: str, source: Path | None = None, seed: int = 0) -> tuple[list[float], State]:
    """The losses of the validations and the state at the end, on all ranks, or in one process with Lightning's own."""
    model_class, make, state = WAYS[name] if name else (Plain, make_trainer, gathered)
    average = LoRAWeightAveraging(DECAY) if name else EMAWeightAveraging(decay=DECAY)
    torch.manual_seed(seed)
    model = model_class()
    saves = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    callbacks = LoRACallback(save=kind, **OPTIONS), average, saves
    trainer = make(path, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(model, *(data() if name else (loader(), loader(seed=6))), ckpt_path=source)
    return model.losses, state(trainer)


def assert_close(found: State, expected: State) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0)


@weight_averaging
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", "merged"),
        ("FSDP2", "adapter"),
        pytest.param("FSDP2, gathered", "adapter", marks=pytest.mark.slow),
        pytest.param("FSDP2, at the root", "merged", marks=pytest.mark.slow),
        pytest.param("FSDP1", "adapter", marks=pytest.mark.slow),
        pytest.param("FSDP1", "merged", marks=pytest.mark.slow),
        pytest.param("DeepSpeed, stage 1", "adapter", marks=[pytest.mark.slow, deepspeed]),
        pytest.param("DeepSpeed, stage 3", "adapter", marks=[pytest.mark.slow, deepspeed]),
        pytest.param("DeepSpeed, stage 3", "merged", marks=[pytest.mark.slow, deepspeed]),
    ],
)
def test_two_ranks_equal_lightnings_average_on_one_device_and_are_resumed_exactly(tmp_path: Path, name: str, kind: str):
    if name.startswith("DeepSpeed"):
        world().run(import_package, "deepspeed", timeout=240)
    losses, expected = fit("", tmp_path / "alone", kind)
    base = Plain().state_dict()
    whole = world().run(fit, name, tmp_path / "whole", kind)
    for found, state in whole:
        assert found == pytest.approx(losses, abs=1e-6)
        assert_close(state, {n: v for n, v in expected.items() if n not in base or n.startswith("net.4")})
        assert_same_bits(
            *({n: v for n, v in each.items() if n in base and not n.startswith("net.4")} for each in (state, base))
        )
    for n in range(EPOCHS):
        mine, theirs = (torch.load(tmp_path / run / f"epoch={n}.ckpt", weights_only=True) for run in ("whole", "alone"))
        for part in ("state_dict", "current_model_state", "averaging_state"):
            assert mine[part].keys() == theirs[part].keys()
            assert_close(mine[part], theirs[part])
        assert any(
            (mine["state_dict"][n] - mine["current_model_state"][n]).abs().max() > 1e-3 for n in ["net.4.weight"]
        )
    for (found, state), (before, end) in zip(
        world().run(fit, name, tmp_path / "second", kind, tmp_path / "whole/epoch=1.ckpt", 5), whole, strict=True
    ):
        assert found == before[2:]
        assert_same_bits(state, end)
    assert_close(load_from_checkpoint(Plain, tmp_path / "whole/epoch=2.ckpt").state_dict(), whole[0][1])
