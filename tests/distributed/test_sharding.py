"""FSDP2: merging works on each rank's shards, sends no base weight, and gives every shard back bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merged,
    merged_state_dict,
    unmerge,
)
from support.models.networks import Zoo, randomise_, tokens, zoo_config
from support.ranks.processes import world
from support.ranks.sharded import (
    DEVICE,
    WAYS,
    X,
    base_of,
    shard_,
    whole_state,
)
from support.ranks.sharded_adapters import adapters, assert_same_bits, injected
from support.runs.recorders import Traffic

# --- every way of sharding, against the same network on one device ---

WAYS_OF_FOUR: dict[str, dict[str, Any]] = {
    "resharded to two": {"reshard_after_forward": 2},
    "two copies": {"shape": (2, 2)},
}


def cycles(way: str) -> None:
    dtype = torch.bfloat16 if way == "bfloat16 base" else torch.float32
    options = (WAYS | WAYS_OF_FOUR)[way]
    net, alone = shard_(injected(dtype=dtype), **options), injected(dtype=dtype).to(DEVICE)
    before = base_of(whole_state(net))
    assert_same_bits(before, base_of(whole_state(alone)))
    coarse = way in ("mixed precision", "bfloat16 base")
    close = {"rtol": 0.05, "atol": 0.05} if coarse else {"rtol": 1e-5, "atol": 1e-5}
    optimizers = [torch.optim.SGD(adapters(model), lr=0.05) for model in (net, alone)]
    x = X.to(DEVICE, dtype)
    for epoch in range(4):
        for model, optimizer in zip((net, alone), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(net(x).float(), alone(x).float(), **close)
        factored = net(x)
        with torch.inference_mode(mode=epoch == 1), torch.no_grad():
            merge(net)
            answer = net(x)
            with merged(alone):
                torch.testing.assert_close(answer.float(), alone(x).float(), **close)
            assert is_merged(net)
            with torch.inference_mode(False):  # torch takes no state dict of DTensors in it
                assert_same_bits(base_of(whole_state(net)), before)  # which tells W, merged or not
            unmerge(net)
        torch.testing.assert_close(answer.float(), factored.float(), **close)
        assert not torch.equal(answer, base_answer(net, x))
        assert_same_bits(base_of(whole_state(net)), before)


def base_answer(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with disable_adapter(net):
        return net(x)


@pytest.mark.slow
@pytest.mark.usefixtures("devices_of_ranks")
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("layers", "resharded")])  # tables/ have these
def test_sharded_model_merges_as_one_device_and_restores_every_shard(way):
    world().run(cycles, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_OF_FOUR)
def test_model_sharded_over_four_ranks_merges_as_one_device(way):
    world(4).run(cycles, way)


def reference_pass(reshard_after_forward: bool) -> None:
    """A reference pass between forward and backward, as of a model on one device, and statistics of a norm."""
    alone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for number, parameter in enumerate(alone.parameters()):
            parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).view_as(parameter))
    base = copy.deepcopy(alone).eval()
    inject(alone, LoRAConfig(r=2, target_modules=["0", "3"]))
    randomise_(alone)
    alone[1].running_mean.add_(1)
    x = torch.linspace(-1, 1, 32).view(4, 8)
    net = shard_(copy.deepcopy(alone), reshard_after_forward=reshard_after_forward).eval()
    alone.eval()
    for backward_inside in (False, True):
        output = net(x)
        with disable_adapter(net):
            reference = net(x)
            if backward_inside:
                (output - reference.detach()).square().sum().backward()
        torch.testing.assert_close(reference, base(x))
        if not backward_inside:
            (output - reference.detach()).square().sum().backward()
        (alone(x) - base(x).detach()).square().sum().backward()
        for (name, found), wanted in zip(net.named_parameters(), alone.parameters(), strict=True):
            if wanted.grad is not None:
                torch.testing.assert_close(found.grad.full_tensor(), wanted.grad, msg=name)
        net.zero_grad()
        alone.zero_grad()
        assert_same_bits(whole_state(net), whole_state(alone))


@pytest.mark.slow
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_a_reference_pass_of_a_sharded_model_leaves_the_gradients(reshard_after_forward):
    world().run(reference_pass, reshard_after_forward)


def reference_of_a_sharded_head() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    inject(net, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    randomise_(net)
    x = torch.ones(2, 8)
    net = shard_(net)
    before, output = whole_state(net), net(x)
    for _ in range(2):
        with pytest.raises(LoRAError, match=r"disable_adapter: '2\.weight' is trained and sharded.*leave it out of"):
            disable_adapter(net).__enter__()
    assert_same_bits(whole_state(net), before)
    assert torch.equal(net(x), output)


def test_the_base_of_a_sharded_head_is_refused_by_name():
    world().run(reference_of_a_sharded_head)


def sequences() -> None:
    net, alone = shard_(injected()), injected()
    x = X.expand(2, 4, 6).contiguous()
    answer = net(x)  # torch warns of a layer whose output is a view: its hooks are lost where that is changed in place
    torch.testing.assert_close(answer, alone(x))
    assert not net[0](x)._is_view()


def test_outputs_of_sequences_are_no_views():
    world().run(sequences)


def zoo_cycles() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Zoo().eval()
        inject(model, zoo_config(enable_lora={"body.3": [True, False]}))
        randomise_(model, 0.3)
        models.append(model)
    net, alone = models
    for layer in (net.embed, net.conv, *net.body, net.head):
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(net)
    assert {type(m).__name__ for m in net.modules()} >= {"FSDPEmbedding", "FSDPConv1d", "FSDPOwnLinear"}
    before = whole_state(net)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens()), alone(tokens()))
        with merged(net), merged(alone):
            torch.testing.assert_close(net(tokens()), alone(tokens()))
            assert_same_bits(whole_state(net), before)
        expected = merged_state_dict(alone)
        found = {
            name: value.full_tensor() for name, value in merged_state_dict(net).items() if isinstance(value, DTensor)
        }
        assert len(found) == len(list(net.parameters())) - 8  # all but the factors
        assert_same_bits(found, {name: expected[name] for name in found})
    assert_same_bits(whole_state(net), before)


@pytest.mark.slow
def test_every_kind_of_sharded_layer_merges_as_one_device():
    world().run(zoo_cycles)


# --- what merging sends ---


def traffic() -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    inject(net, LoRAConfig(r=4))
    randomise_(net)
    shard_(net)
    factors = sum(factor.to_local().nbytes for factor in adapters(net))
    base = sum(p.to_local().nbytes for name, p in net.named_parameters() if "lora_" not in name)
    found: dict[str, Any] = {"factors": factors, "base": base}
    for name, step in (
        ("forward and backward", lambda: net(torch.ones(2, 64)).sum().backward()),
        ("merge", lambda: merge(net)),
        ("again", lambda: merge(net)),
        ("state dict", net.state_dict),
        ("unmerge", lambda: unmerge(net)),
    ):
        with Traffic() as sent:
            step()
        found[name] = sent
    return {name: value if isinstance(value, int) else (value.sent, value.bytes()) for name, value in found.items()}


@pytest.mark.slow
def test_merging_gathers_the_factors_and_no_weight():
    found = world().run(traffic)[0]
    print(found)
    gathers = [size for name, size in found["merge"][0] if "gather" in name]
    assert sum(gathers) == found["factors"]
    assert len(gathers) == 4
    assert [entry for entry in found["merge"][0] if "gather" not in entry[0]] == [("allreduce_", 8)]
    assert found["again"][1] == found["state dict"][1] == found["unmerge"][1] == 0
    gathered = sum(size for name, size in found["forward and backward"][0] if "allgather" in name)
    assert gathered > found["base"]  # the counter sees weights where they are sent
    reduced = sum(size for name, size in found["forward and backward"][0] if "reduce_scatter" in name)
    assert reduced == 2 * found["factors"]  # whole gradients of the factors, and of nothing else
