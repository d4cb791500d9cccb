"""Checkpoints of sharded models: contents, resuming, other numbers of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAError,
    load_adapter,
)
from support.ranks.processes import world
from support.ranks.sharded import (
    FEATURES,
    Plain,
    Sharded,
    base_of,
    data,
    loader,
    make_trainer,
    model_parallel,
    optimizer_state,
    whole_state,
)
from support.ranks.sharded_adapters import assert_same_bits, lora
from support.runs.recorders import Traffic

FACTORS = sorted(f"net.{i}.lora_{leaf}" for i in (0, 2, 4) for leaf in "AB")


class LeavesOutFactors(Sharded):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if "lora" not in name}


def save_without_factors(path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    trainer = model_parallel(path, lora(), max_epochs=1)
    trainer.fit(model := LeavesOutFactors(), *data())
    trainer.save_checkpoint(path / "a.ckpt")
    return whole_state(model)


@pytest.mark.slow
def test_factors_that_a_sharded_modules_hook_leaves_out_are_saved_all_the_same(tmp_path):
    state = world().run(save_without_factors, tmp_path)[0]
    assert sorted(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == FACTORS
    load_adapter(fresh := Plain(), tmp_path / "a.ckpt")
    assert_same_bits(whole_state(fresh), state)


# --- another number of processes ---


def resumed_from_full(path: Path, source: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    trainer = model_parallel(path, lora(), max_epochs=4)
    trainer.fit(model := Sharded(), *data(), ckpt_path=source)
    return whole_state(model)


@pytest.mark.slow
def test_full_checkpoint_of_one_process_is_resumed_by_two(tmp_path):
    model, file = Plain(), tmp_path / "one.ckpt"
    trainer = make_trainer(tmp_path, lora(save="full"), max_epochs=2)
    trainer.fit(model, loader(), loader(seed=6))
    trainer.save_checkpoint(file)
    make_trainer(tmp_path, lora(save="full"), max_epochs=4).fit(model, loader(), loader(seed=6), ckpt_path=file)
    expected = whole_state(model)
    for state in world().run(resumed_from_full, tmp_path, file):
        assert_same_bits(base_of(state), base_of(expected))
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-6)


class Unordered(Plain):
    """Its optimizer has the last layer first. Layers of one shape do not tell to which of them a state belongs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(3)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [[p for n, p in self.named_parameters() if "lora_" in n and f".{i}." in n] for i in (2, 1, 0)]
        return torch.optim.AdamW([{"params": group, "lr": 0.05 / (i + 1)} for i, group in enumerate(groups)])


class UnorderedSharded(Unordered, Sharded):
    pass


def alone(path: Path, epochs: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    trainer = make_trainer(path, LoRACallback(r=2, target_modules="all-linear"), max_epochs=epochs)
    trainer.fit(model := Unordered(), loader(), loader(seed=6))
    trainer.save_checkpoint(path / "saved.ckpt")
    return whole_state(model)


def resumed_sharded(path: Path, source: Path) -> dict[str, torch.Tensor] | str:
    trainer = model_parallel(path, LoRACallback(r=2, target_modules="all-linear"), max_epochs=3)
    try:
        trainer.fit(model := UnorderedSharded(), *data(), ckpt_path=source)
    except LoRAError as error:
        return str(error)
    return whole_state(model)


@pytest.mark.slow
def test_optimizer_in_a_file_of_one_device_is_resumed_parameter_by_parameter(tmp_path):
    uninterrupted = alone(tmp_path / "whole", 3)
    alone(tmp_path / "first", 2)
    for found in world().run(resumed_sharded, tmp_path, tmp_path / "first" / "saved.ckpt"):
        assert found.keys() == uninterrupted.keys()
        for name, value in uninterrupted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def other_groups(saved: Any) -> None:
    first, second, third = saved["optimizer_states"][0]["param_groups"]
    first["params"] += second["params"]
    saved["optimizer_states"][0]["param_groups"] = [first, third]


def other_optimizers(saved: Any) -> None:
    saved["optimizer_states"] *= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "groups"), [(other_groups, "[[4, 2]]"), (other_optimizers, "[[2, 2, 2], [2, 2, 2]]")]
)
def test_optimizer_in_a_file_that_has_other_groups_is_an_error(tmp_path, change, groups):
    alone(tmp_path, 2)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "other.ckpt")
    said = f"have groups of {groups} parameters, and configure_optimizers built groups of [[2, 2, 2]]"
    for error in world().run(resumed_sharded, tmp_path, tmp_path / "other.ckpt"):
        assert said in error


# --- what does not fit ---


def evaluate_after_the_fit(path: Path) -> tuple[list[float], str]:
    """Evaluate twice after a fit, the second time from a checkpoint without optimizers. Then fit from it."""
    torch.manual_seed(0)
    trainer, model, file = model_parallel(path, lora(), max_epochs=1), Sharded(), path / "weights.ckpt"
    trainer.fit(model, *data())
    trainer.save_checkpoint(file, weights_only=True)
    before = optimizer_state(trainer)
    for source in (None, file):
        trainer.validate(model, data()[1], ckpt_path=source, verbose=False)
    assert_same_bits(optimizer_state(trainer), before)
    with pytest.raises(LoRAError) as refused:
        model_parallel(path, lora(), max_epochs=2).fit(Sharded(), *data(), ckpt_path=file)
    return model.losses[-2:], str(refused.value)


@pytest.mark.slow
def test_weights_alone_are_evaluated_after_a_fit_and_no_fit_goes_on_from_them(tmp_path):
    for (now, from_file), refused in world().run(evaluate_after_the_fit, tmp_path):
        assert now == from_file
        assert "holds weights only, without the optimizer's state that a fit goes on with" in refused


def refused(path: Path, file: Path) -> str:
    model = Sharded()
    before = whole_state(model)
    with pytest.raises(LoRAError) as caught:
        model_parallel(path, lora()).validate(model, data()[1], ckpt_path=file)
    state = whole_state(model)
    assert_same_bits({name: state[name] for name in before}, before)
    return str(caught.value)


@pytest.mark.slow
def test_checkpoint_of_another_base_or_a_part_is_refused_on_every_rank(tmp_path):
    other, cut, part = (tmp_path / f"{name}.ckpt" for name in ("other", "cut", "part"))
    trainer, model = make_trainer(tmp_path, lora(), max_epochs=1), Plain()
    with torch.no_grad():
        model.net[2].weight[-1] *= 1.05
    trainer.fit(model, loader(), loader(seed=6))
    trainer.save_checkpoint(other)
    content = torch.load(other, weights_only=True)
    del content["state_dict"]["net.2.lora_B"]
    torch.save(content, cut)
    base = {name: torch.zeros(1) for name in Plain().state_dict() if name != "net.0.bias"}
    torch.save({"pytorch-lightning_version": "2.0.0", "state_dict": base}, part)
    for file, said in (
        (other, "another base: values of 'net.2.weight'"),
        (cut, "net.2.lora_B' is missing"),
        (part, "'net.0.bias' is missing"),
    ):
        for message in world().run(refused, tmp_path, file):
            assert said in message


def base_run(path: Path) -> None:
    """A checkpoint of the base, written by Lightning alone."""
    model = Sharded()
    trainer = model_parallel(path, whole=True, max_epochs=1)
    trainer.fit(model, *data())
    trainer.save_checkpoint(path / "base.ckpt")
    trained = whole_state(model)
    adapted = Sharded()
    model_parallel(path, lora()).validate(adapted, data()[1], ckpt_path=path / "base.ckpt", verbose=False)
    state = whole_state(adapted)
    assert_same_bits(base_of(state), trained)
    assert len(state) == len(trained) + 6
    with pytest.raises(LoRAError, match="the checkpoint at ckpt_path holds no adapter"):
        model_parallel(path, lora(), max_epochs=2).fit(Sharded(), *data(), ckpt_path=path / "base.ckpt")


@pytest.mark.slow
def test_checkpoint_of_the_base_loads_into_an_adapted_sharded_model(tmp_path):
    world().run(base_run, tmp_path)


# --- what saving sends ---


def traffic_of_saving(path: Path, save: str) -> tuple[int, int, int]:
    model = Sharded()
    trainer = model_parallel(path, lora(save=save), max_epochs=1)
    trainer.fit(model, *data())
    with Traffic() as sent:
        trainer.strategy.lightning_module_state_dict()
    gathered = sum(size for name, size in sent.sent if "gather" in name)
    sizes = {name: parameter.to_local().nbytes for name, parameter in model.named_parameters()}
    factors = sum(size for name, size in sizes.items() if "lora_" in name)
    return gathered, factors, sum(sizes.values()) - factors


@pytest.mark.slow
def test_saving_an_adapter_gathers_no_weight(tmp_path):
    for gathered, factors, _ in world().run(traffic_of_saving, tmp_path, "adapter"):
        assert gathered <= 1.5 * factors + 64  # padding of uneven shards
    for gathered, _, base in world().run(traffic_of_saving, tmp_path, "merged"):
        assert gathered >= base  # the counter sees weights where they are sent
