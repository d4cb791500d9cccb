"""verify=True where weights are sharded: the figures of one process, the same on every rank."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from lightning_lora import merge, merged, merged_state_dict
from lightning_lora.model.adapted_model import Listing
from lightning_lora.model.self_check import Verification, watch
from support.processes import world
from support.sharded import WAYS, Sharded, X, base_of, data, model_parallel, network, shard_, whole_state
from support.sharded_adapters import PLANS, TENSOR_X, assert_same_bits, block, injected, lora, mesh

NAMES = ("lora_merge_error_max", "lora_merge_error_relative")


def figures(found: Verification) -> list[float]:
    errors = found.error.compute()
    return [errors["max"].item(), errors["relative"].item()]


def expected_figures(way: str, lora_merged: bool) -> list[float]:
    """Each layer by hand on one device, with merged and with factored weights, on the input that it gets."""
    alone = injected(dtype=torch.bfloat16 if way == "bfloat16 base" else torch.float32)
    plain = network().to(next(alone.parameters()).dtype)
    plain.load_state_dict(merged_state_dict(alone))
    x = X
    if way in ("bfloat16 base", "mixed precision"):
        plain, alone, x = plain.bfloat16(), alone.bfloat16(), x.bfloat16()
    ones, others = [], []
    with torch.no_grad():
        for one, other in zip(plain, alone, strict=True):
            outputs = one(x), other(x)
            if isinstance(one, nn.Linear):
                ones.append(outputs[0].double().flatten())
                others.append(outputs[1].double().flatten())
            x = outputs[0 if lora_merged else 1]
    difference = torch.cat(ones) - torch.cat(others)
    return [difference.abs().max().item(), (difference.norm() / torch.cat(others).norm()).item()]


def verified(way: str, lora_merged: bool) -> list[float]:
    net = shard_(injected(dtype=torch.bfloat16 if way == "bfloat16 base" else torch.float32), **WAYS[way])
    net[1].inplace = net[3].inplace = True  # writes into what the layer before gave
    before = whole_state(net)
    x = X.chunk(dist.get_world_size())[dist.get_rank()].to(next(net.parameters()).dtype)
    with merged(net) if lora_merged else nullcontext(), torch.inference_mode(way == "layers"), torch.no_grad():
        with watch(Listing(net)) as found:
            answer = net(x)
        assert torch.equal(net(x), answer)
        assert found.problems() == ""
    assert not [hook for module in net for hook in module._forward_hooks.values() if "check" in repr(hook)]
    assert_same_bits(whole_state(net), before)
    return figures(found)


@pytest.mark.slow
@pytest.mark.parametrize("lora_merged", [True, False])
@pytest.mark.parametrize("way", ["layers", "root only", "offloaded", "mixed precision", "bfloat16 base", "by columns"])
def test_verify_of_a_sharded_model_gives_the_figures_of_one_process(way: str, lora_merged: bool):
    first, second = world().run(verified, way, lora_merged)
    assert first == second
    coarse = way in ("mixed precision", "bfloat16 base")
    # In float32 an error is the rounding of sums, which one process takes in another order.
    assert first == pytest.approx(expected_figures(way, lora_merged), **({"rel": 1e-3} if coarse else {"abs": 1e-6}))
    assert first[1] > (1e-3 if coarse else 1e-9)


def wrong() -> list[float]:
    net = shard_(injected())
    merge(net)
    if dist.get_rank() == 1:
        with torch.no_grad():
            net[2].weight.to_local()[0, 0] += 3.0
    with torch.no_grad(), watch(Listing(net)) as found:
        net(X)
    return figures(found)


def test_a_wrong_shard_on_one_rank_shows_on_all():
    first, second = world().run(wrong)
    assert first == second
    assert first[0] > 0.1


def tensor_parallel(plan: str) -> list[list[float]]:
    net, results = parallelize_module(block(), mesh(), PLANS[plan]), []
    x = TENSOR_X.chunk(2, dim=1)[dist.get_rank()] if plan == "sequence" else TENSOR_X
    for damage in (0.0, 1.0):
        for lora_merged in (True, False):
            with torch.no_grad():
                if damage:
                    merge(net)
                    net.down.weight.to_local()[0, 0] += damage
                with merged(net) if lora_merged and not damage else nullcontext(), watch(Listing(net)) as found:
                    net(x)
            assert found.problems() == ""
            results.append(figures(found))
    assert all(isinstance(parameter, DTensor) for parameter in net.up.parameters())
    return results


@pytest.mark.parametrize("plan", ["even", "sequence"])
def test_verify_of_a_tensor_parallel_model_finds_damage(plan: str):
    (one, other, *damaged), second = world().run(tensor_parallel, plan)
    assert [one, other, *damaged] == second
    assert 0 < one[1] < 1e-6
    assert 0 < other[1] < 1e-6
    assert damaged[0][0] > 0.1


class UsedBySome(nn.Module):
    """A layer that the first rank alone runs, one that the second alone does, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(6, 7) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ways[dist.get_rank()](x)


def uses() -> str:
    from lightning_lora import LoRAConfig, inject

    net = UsedBySome()
    inject(net, LoRAConfig(r=2, init_lora_weights=False))
    with torch.no_grad():
        if dist.get_rank() == 0:
            net.ways[0].lora_B.zero_()
        with watch(Listing(net)) as found:
            net(X)
    return found.problems()


def test_verify_does_not_report_layers_that_another_rank_ran():
    message = "these adapted layers never ran: ways.2; these adapters had no effect: ways.0"
    assert world().run(uses) == [message, message]


def trained(path: Path, verify: bool, merged_eval: bool) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    model = Sharded()
    before = base_of(whole_state(model))
    callback = lora(verify=verify, merged_eval=merged_eval, init_lora_weights=False)
    trainer = model_parallel(path, callback)
    trainer.fit(model, *data())
    assert_same_bits(base_of(whole_state(model)), before)
    logged = [trainer.callback_metrics[name].item() for name in NAMES] if verify else []
    validated = model_parallel(path, callback).validate(model, data()[1], verbose=False)[0]
    assert all(name in validated for name in NAMES) is verify
    return model.losses, whole_state(model), logged


@pytest.mark.slow
@pytest.mark.parametrize("merged_eval", [True, False])
def test_verify_in_a_sharded_fit_does_not_change_the_run(tmp_path, merged_eval: bool):
    (losses, state, logged), (*_, other) = world().run(trained, tmp_path, True, merged_eval)
    assert logged == other
    assert 0 < logged[1] < logged[0] < 1e-5
    expected = world().run(trained, tmp_path, False, merged_eval)[0]
    assert losses == expected[0]
    assert_same_bits(state, expected[1])


def warned(path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model_parallel(path, lora(verify=True)).validate(Sharded(), data()[1], verbose=False)
    return [str(warning.message) for warning in found if "LoRACallback" in str(warning.message)]


def test_verify_names_adapters_without_effect(tmp_path):
    first, second = world().run(warned, tmp_path)
    (message,) = first
    assert message.startswith("LoRACallback: these adapters had no effect: net.0, net.2, net.4. They have the values")
    assert second == []


class Fails(Sharded):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        raise ZeroDivisionError


def broken_off(path: Path) -> None:
    """A rank that fails must not wait for others in a gather of its own."""
    model = Fails()
    with mock.patch("lightning_lora.model.self_check._weights") as gathered:
        with pytest.raises(ZeroDivisionError):
            model_parallel(path, lora(verify=True)).validate(model, data()[1], verbose=False)
        assert not gathered.called
    assert not [hook for module in model.modules() for hook in module._forward_hooks.values() if "check" in repr(hook)]


def test_verify_of_a_batch_that_fails_gathers_nothing(tmp_path):
    world().run(broken_off, tmp_path)
