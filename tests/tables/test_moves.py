"""Each move of a model's parts after injection, and each fact that goes with its tensors.

A model whose parts were moved is compared with a base whose parts were moved in the same way.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    attach,
    attached,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merged,
    merged_state_dict,
    save_adapter,
    scaled,
    set_strength,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.distributed.sharding import full_tensor
from lightning_lora.exchange.checkpoint_of_model import write_whole_state_
from lightning_lora.exchange.take import fingerprint_of
from lightning_lora.model.adapted_model import open_model
from lightning_lora.model.live_state import open_state
from support.models.networks import randomise_, same
from support.ranks.processes import world

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.norm(self.fc(x)).tanh()
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x.to(next(self.parameters()).dtype))
        result: torch.Tensor = (self.output if hasattr(self, "output") else self.head)(x)
        return result


class Around(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.inner = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


def reorder(net: Net) -> nn.Module:
    net.blocks = nn.ModuleList(reversed(list(net.blocks)))
    return net


def swap(net: Net) -> nn.Module:
    net.blocks[0], net.blocks[2] = net.blocks[2], net.blocks[0]
    return net


def wrap(net: Net) -> nn.Module:
    net.blocks[1] = nn.Sequential(net.blocks[1])
    return net


def rename(net: Net) -> nn.Module:
    net.output = net.head
    del net.head
    return net


def slice_(net: Net) -> nn.Module:
    net.blocks = nn.ModuleList(net.blocks)[1:]
    return net


def swap_tensors(net: Net) -> nn.Module:
    one, other = net.blocks[0].norm, net.blocks[2].norm
    one.bias, other.bias = other.bias, one.bias
    return net


def synchronise(net: Net) -> nn.Module:
    result: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return result


def new_parent(net: Net) -> nn.Module:
    return Around(net)


def copied(net: Net) -> nn.Module:
    return copy.deepcopy(net)


def pickled(net: Net) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(net))
    return result


def cast(net: Net) -> nn.Module:
    return net.double()


def replaced_by_assign(net: Net) -> nn.Module:
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    return net


def copy_in_a_new_parent(net: Net) -> nn.Module:
    return Around(copy.deepcopy(reorder(net)))


MOVES = [
    reorder,
    swap,
    wrap,
    rename,
    slice_,
    swap_tensors,
    synchronise,
    new_parent,
    copied,
    pickled,
    cast,
    replaced_by_assign,
    copy_in_a_new_parent,
]


def base() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for number, block in enumerate(net.blocks):  # so that no block's values are another's
            block.norm.bias.fill_(number), block.norm.running_mean.fill_(number / 10)
    net.blocks[1].norm.weight.requires_grad_(False)
    return net


def trained() -> Net:
    """A model of which every tensor that training can change has changed."""
    net = base()
    inject(net, LoRAConfig(r=2, target_modules=["fc"], modules_to_save=["head"], bias="all"))
    handle = open_model(net, "test")
    handle.set_fingerprint(fingerprint_of(open_state(handle)))  # as a fit does when it starts
    randomise_(net, 0.5)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in net.parameters() if p.requires_grad and p.ndim):
            parameter.add_(number + 1)
        for block in net.blocks:
            block.norm.running_mean.add_(1)
    return net


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, check_dtype=False)


def first_values_stand_in(net: Net, move: Callable[[Net], nn.Module]) -> None:
    moved = move(net)
    with disable_adapter(moved):
        close(moved(X), move(base())(X))


def first_values_come_back(net: Net, move: Callable[[Net], nn.Module]) -> None:
    moved, expected = move(net), move(base())
    unload(moved)
    assert moved.state_dict().keys() == expected.state_dict().keys()
    assert all(same(value, moved.state_dict()[name]) for name, value in expected.state_dict().items())
    flags = {name: parameter.requires_grad for name, parameter in expected.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in moved.named_parameters()} == flags


def what_is_trained_is_saved(net: Net, move: Callable[[Net], nn.Module], path: str) -> None:
    moved, fresh = move(net), move(base())
    for parameter in moved.parameters():
        parameter.requires_grad_(False)  # a record knows it, and not a flag
    biases = {name for name, _ in fresh.named_parameters() if name.endswith("bias")}
    assert adapter_state_dict(moved).keys() >= biases
    save_adapter(moved, path)
    load_adapter(fresh, path)
    close(fresh(X), moved(X))


def strengths_stay(net: Net, move: Callable[[Net], nn.Module]) -> None:
    style = base()
    inject(style, LoRAConfig(r=1, target_modules=["fc"], init_lora_weights=False))
    attach(net, take_adapter(style), name="style", strength=0.5)
    before = net(X)
    moved = move(net)
    assert attached(moved) == {"style": 0.5}
    if move in (rename, synchronise, new_parent, copied, pickled, cast, replaced_by_assign, wrap):
        close(moved(X), before)
    set_strength(moved, 0.0, "style")
    without = moved(X)
    with scaled(moved, 0.0, "style"):
        close(moved(X), without)


def a_merge_is_undone(net: Net, move: Callable[[Net], nn.Module]) -> None:
    weights = {block: block.fc.weight.detach().clone() for block in net.blocks}
    unmerged = move(copy.deepcopy(net))(X)
    merge(net)
    moved = move(net)
    close(moved(X), unmerged)
    unmerge(moved)
    close(moved(X), unmerged)
    blocks = [module for module in moved.modules() if isinstance(module, Block)]
    if move in (reorder, swap, wrap, rename, slice_, synchronise, new_parent):
        assert all(same(block.fc.weight, weights[block]) for block in blocks)
    with merged(moved):
        close(moved(X), unmerged)


def merged_weights_are_refused(net: Net, move: Callable[[Net], nn.Module]) -> None:
    moved = move(net)
    state = merged_state_dict(moved)
    for strict in (True, False):
        with pytest.raises(LoRAError, match="holds merged weights"):
            moved.load_state_dict(state, strict=strict)
    plain = move(base())
    plain.load_state_dict(state)
    close(plain(X), moved(X))


FACTS = [
    first_values_stand_in,
    first_values_come_back,
    strengths_stay,
    a_merge_is_undone,
    merged_weights_are_refused,
]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("fact", FACTS)
def test_what_is_known_goes_with_the_tensors(move: Callable[[Net], nn.Module], fact: Callable[..., None]):
    fact(trained(), move)


@pytest.mark.parametrize("move", MOVES)
def test_what_was_trained_whole_is_saved_after(move: Callable[[Net], nn.Module], tmp_path):
    what_is_trained_is_saved(trained(), move, str(tmp_path / "adapter"))


# --- FSDP2, which replaces tensors by shards ---


def shard_(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, Block):
            fully_shard(module)


def knows_what_one_device_knows(move: Callable[[Net], nn.Module], when: str) -> None:
    net, expected = trained(), move(base())
    alone = move(trained())
    style = base()
    inject(style, LoRAConfig(r=1, target_modules=["fc"], init_lora_weights=False))
    attach(net, take_adapter(style), name="style", strength=0.5)
    if when == "sharded, then moved":
        shard_(net)
    moved = move(net)
    if when == "moved, then sharded":
        shard_(moved)
    handle = open_model(moved, "test")
    parameters = dict(expected.named_parameters())
    buffers = dict(expected.named_buffers())
    first = handle.initial()
    assert first.keys() == open_model(alone, "test").initial().keys()
    assert all(same(full_tensor(value), {**parameters, **buffers}[name].detach()) for name, value in first.items())
    assert adapter_state_dict(moved).keys() == adapter_state_dict(alone).keys()
    assert handle.fingerprint() == open_model(alone, "test").fingerprint()
    before = {name: full_tensor(p.detach()).clone() for name, p in moved.named_parameters()}
    merge(moved)
    unmerge(moved)
    assert all(same(full_tensor(p.detach()), before[name]) for name, p in moved.named_parameters())
    with pytest.raises(LoRAError, match="is trained and sharded"), disable_adapter(moved):
        pass
    assert attached(moved) == {"style": 0.5}
    state = merged_state_dict(moved)
    with pytest.raises(LoRAError, match="holds merged weights"):
        moved.load_state_dict(state, strict=False)
    with pytest.raises(LoRAError, match="holds merged weights"):
        write_whole_state_(handle, {"state_dict": state}, strict=True)  # as a Trainer loads it, past the layers


@pytest.mark.slow
@pytest.mark.parametrize("when", ["sharded, then moved", "moved, then sharded"])
def test_facts_under_fsdp2(when: str):
    for move in (reorder, rename, slice_, wrap):
        world().run(knows_what_one_device_knows, move, when)
