"""Tensor parallelism: factors placed beside the weights, no collective of their own in forward, merged evaluation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    is_merged,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    unload,
)
from lightning_lora.distributed.tensor_parallel import low_rank_product, place_like_weight
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.inject import adapt_new_layers
from support.models.networks import randomise_
from support.ranks.processes import world
from support.ranks.sharded import DEVICE, base_of, whole_state
from support.ranks.sharded_adapters import (
    ALL_LINEAR,
    PLAN,
    PLANS,
    SEQUENCE,
    TENSOR_X,
    adapters,
    assert_same_bits,
    block,
    mesh,
)
from support.runs.recorders import Traffic


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def let_what_torch_unfreezes_be() -> None:
    """torch's parallel styles make new parameters, which need gradients and have no first values: torch 2.6 of all."""
    warnings.filterwarnings("ignore", "lightning_lora. (disable_adapter|unload) cannot bring back")


def parallel(plan: str) -> None:
    hidden = 5 if plan == "uneven" else 8
    net, alone = parallelize_module(block(hidden=hidden), mesh(), PLANS[plan]), block(hidden=hidden)
    x = TENSOR_X.chunk(2, dim=1)[dist.get_rank()] if plan == "sequence" else TENSOR_X
    assert net.up.lora_A.placements == (Replicate(),)
    assert net.up.lora_B.placements == net.up.weight.placements == (Shard(0),)
    assert net.down.lora_A.placements == net.down.weight.placements == (Shard(1),)
    assert net.down.lora_B.placements == (Replicate(),)
    before = base_of(whole_state(net))
    optimizers = [torch.optim.AdamW(adapters(model), lr=0.05) for model in (net, alone)]
    for _ in range(3):
        for model, optimizer in zip((net, alone), optimizers, strict=True):
            optimizer.zero_grad()
            whole(model(x if model is net else TENSOR_X)).square().mean().backward()
        for one, other in zip(adapters(net), adapters(alone), strict=True):
            assert one.grad.placements == one.placements
            torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(whole(net(x)), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
            with merged(net), merged(alone):
                torch.testing.assert_close(whole(net(x)), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
                assert not torch.equal(before["up.weight"], net.up.weight.full_tensor())
            let_what_torch_unfreezes_be()
            with disable_adapter(net), disable_adapter(alone):
                torch.testing.assert_close(whole(net(x)), alone(TENSOR_X), rtol=1e-4, atol=1e-5)
        assert_same_bits(base_of(whole_state(net)), before)
    expected = merged_state_dict(alone)
    for name, value in merged_state_dict(net).items():
        torch.testing.assert_close(whole(value), expected[name])


@pytest.mark.parametrize("plan", PLANS)
def test_training_and_merging_equal_one_device(plan):
    world().run(parallel, plan)


def collectives() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, config, lora_merged in (
        ("base", None, False),
        ("factored", ALL_LINEAR, False),
        ("merged", ALL_LINEAR, True),
    ):
        net = parallelize_module(block(config), mesh(), PLAN)
        if lora_merged:
            merge(net)
        x = TENSOR_X.clone().requires_grad_()
        with Traffic() as sent:
            output = net(x)
        found[name] = sent.sent
        with Traffic() as sent:
            output.sum().backward()
        found[name + " backward"] = sent.sent
    net = parallelize_module(block(ALL_LINEAR), mesh(), PLAN)
    for factor, places in (("lora_A", (Shard(0),)), ("lora_B", (Shard(0),))):  # as parallelize_module would have them
        moved = getattr(net.up, factor).detach().redistribute(placements=places)
        net.up._parameters[factor] = nn.Parameter(moved)
    with Traffic() as sent:
        net(TENSOR_X)
    found["badly placed"] = sent.sent
    return found


def test_the_factors_add_no_collective_to_the_forward():
    found = world().run(collectives)[0]
    print(found)
    assert len(found["base"]) > 0
    assert found["factored"] == found["merged"] == found["base"]
    assert len(found["badly placed"]) > len(found["base"])
    extra = [entry for entry in found["factored backward"] if entry not in found["base backward"]]
    assert sorted(extra) == [("all_reduce", 3 * 6 * 4), ("all_reduce", 6 * 3 * 4)]  # up's A and down's B, once each


def embeddings() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.up = nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.embed(x))

    config = LoRAConfig(r=2, target_modules=["embed", "up"])
    words = torch.arange(10).view(2, 5)
    for style in (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())):
        torch.manual_seed(4)
        alone = Words()
        torch.manual_seed(4)
        net = Words()
        for model in (alone, net):
            inject(model, config)
            randomise_(model, 0.3)
        parallelize_module(net, mesh(), {"embed": style, "up": ColwiseParallel(output_layouts=Replicate())})
        before = whole_state(net)
        torch.testing.assert_close(net(words), alone(words))
        net(words).square().sum().backward()
        alone(words).square().sum().backward()
        for one, other in zip(adapters(net), adapters(alone), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)
        with merged(net), merged(alone):
            torch.testing.assert_close(net(words), alone(words))
        assert_same_bits(whole_state(net), before)


def test_embedding_split_by_either_dimension_equals_one_device():
    world().run(embeddings)


def in_and_out() -> None:
    net = parallelize_module(block(), mesh(), PLAN)
    before, answer = whole_state(net), net(TENSOR_X)
    let_what_torch_unfreezes_be()
    unload(net)
    assert type(net.up) is nn.Linear
    assert_same_bits(whole_state(net), base_of(before))
    net, alone = parallelize_module(block(), mesh(), PLAN), merge_and_unload(block())
    merge_and_unload(net)
    assert type(net.up) is nn.Linear
    assert_same_bits(whole_state(net), whole_state(alone))
    torch.testing.assert_close(net(TENSOR_X), answer, rtol=1e-4, atol=1e-5)
    with pytest.raises(LoRAError, match=r"'up'.*is sharded already"):
        inject(parallelize_module(block(None), mesh(), PLAN), ALL_LINEAR)
    fused = block(LoRAConfig(r=2, target_modules=["up"], enable_lora={"up": [True, False]}))
    with pytest.raises(LoRAError, match="enable_lora"):
        parallelize_module(fused, mesh(), PLAN)
    with torch.no_grad():
        net = parallelize_module(block(), mesh(), PLAN)
        if dist.get_rank() == 0:
            net.down.lora_A.to_local().fill_(torch.nan)
        with pytest.raises(LoRAError, match="merge: layer 'down'"):
            merge(net)
        assert not is_merged(net)


def test_tensor_parallel_model_unloads_and_refuses_what_it_cannot_do():
    world().run(in_and_out)


def frozen() -> None:
    net = parallelize_module(block(), mesh(), SEQUENCE)
    assert net.norm.weight.requires_grad  # SequenceParallel makes a new parameter
    adapt_new_layers(open_model(net, "test"))  # as the callback does after configure_model
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trainable == ["up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B"]
    place_factors()


def test_what_parallel_styles_unfreeze_is_frozen_again_and_a_frozen_factor_stays_so():
    world().run(frozen)


# --- together with FSDP2 ---


def fail_in_a_merged_forward() -> None:
    both = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
    net = fully_shard(parallelize_module(block(), both["tp"], PLAN), mesh=both["dp"])
    net.down.register_forward_hook(lambda *args: 1 / 0)
    let_what_torch_unfreezes_be()
    for use in (merged(net), disable_adapter(net)):
        with pytest.raises(LoRAError, match=r"gathered by FSDP2, .* or in a forward that an exception ended"), use:
            net(TENSOR_X)  # FSDP2 gathers a weight over two of the four ranks, so that it is a DTensor still
    assert is_merged(net)


@pytest.mark.slow
def test_exception_in_a_merged_forward_of_fsdp2_is_an_error_where_weights_stay_gathered():
    world(4).run(fail_in_a_merged_forward)


def product_of(places: tuple[Any, Any, Any]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 6), (3, 6), (8, 3))]
    plain = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = plain[0] @ plain[1].T @ plain[2].T
    sharded = [
        distribute_tensor(tensor, mesh(), [place]).detach().requires_grad_()
        for tensor, place in zip(tensors, places, strict=True)
    ]
    found = low_rank_product(*sharded)
    torch.testing.assert_close(found.full_tensor(), expected)
    for output in (found.full_tensor(), expected):
        output.square().sum().backward()
    for one, other in zip(sharded, plain, strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)


PLACES = [  # of x, A and B: outputs, inputs, the batch or the sequence is split, or nothing
    (Replicate(), Replicate(), Shard(0)),
    (Shard(2), Shard(1), Replicate()),
    (Shard(0), Replicate(), Replicate()),
    (Shard(1), Replicate(), Replicate()),
    (Replicate(), Replicate(), Replicate()),
]


def products() -> None:
    for places in PLACES:
        product_of(places)
    product_that_needs_communication()


def test_gradients_of_the_product_are_those_of_one_device_or_it_is_left_to_torch():
    world().run(products)


def place_factors() -> None:
    weight = distribute_tensor(torch.zeros(8, 6), mesh(), [Shard(0)])
    for place in (Replicate(), Shard(0)):
        factor = nn.Parameter(distribute_tensor(torch.zeros(8, 2), mesh(), [place]), requires_grad=False)
        found = place_like_weight("lora_B", factor, weight, {0: ("lora_B", 0), 1: ("lora_A", 1)})
        assert found.placements == (Shard(0),)
        assert not found.requires_grad
        assert (found is factor) == (place == Shard(0))  # an optimizer may hold it already


def product_that_needs_communication() -> None:
    x, a, b = (distribute_tensor(torch.ones(shape), mesh(), [Shard(1)]) for shape in ((4, 6), (2, 6), (8, 2)))
    whole_a, whole_b = (factor.redistribute(placements=[Replicate()]) for factor in (a, b))
    assert low_rank_product(x, whole_a, whole_b) is None
    assert low_rank_product(x, a, b) is None
    assert low_rank_product(x, a, whole_b) is not None
