"""FSDP2 in a Trainer's life: where layers are built and adapted, files in and out, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    save_adapter,
    unload,
    unmerge,
)
from support.ranks.processes import world
from support.ranks.sharded import (
    DEVICE,
    TARGETS,
    Plain,
    RootSharded,
    Sharded,
    X,
    base_of,
    data,
    loader,
    make_trainer,
    model_parallel,
    network,
    shard_,
    whole_state,
)
from support.ranks.sharded_adapters import LINEAR, adapters, assert_same_bits, injected, lora

FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
CONFIG = LoRAConfig(r=2, target_modules=TARGETS)


# --- where the layers come from ---


class InjectsItself(Sharded):
    """Builds in configure_model, injects, shards: as a model must that fits nowhere whole."""

    part = ""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        del self.net

    def build(self) -> nn.Module:
        return network()

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = self.build()
            inject(self.get_submodule(self.part), CONFIG)
        super().configure_model()


class InjectsAPart(InjectsItself):
    part = "net"


class OnMeta(InjectsItself):
    """Built without memory; Lightning makes the shards, and the base comes afterwards."""

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return network()

    def configure_model(self) -> None:
        super().configure_model()
        if next(self.parameters()).is_meta:
            self.to_empty(device=DEVICE)
            base = network().state_dict() if dist.get_rank() == 0 else {}  # one rank reads, all take their shards
            set_model_state_dict(self.net, base, options=FROM_FIRST)


class OnMetaByLightning(InjectsItself):
    """Lightning materialises: weights and biases by reset_parameters, the factors by themselves."""

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return network()


def fit(path: Path, kind: type[Sharded]) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(dist.get_rank() if kind is RootSharded else 0)
    model = kind()
    model_parallel(path, lora()).fit(model, *data())
    assert not is_merged(model)
    return model.losses, whole_state(model.to(DEVICE))  # Lightning leaves the shards on the CPU


@pytest.mark.slow
@pytest.mark.usefixtures("devices_of_ranks")
@pytest.mark.parametrize("kind", [RootSharded, InjectsAPart, OnMeta])
def test_training_equals_that_on_one_device(tmp_path, kind):
    torch.manual_seed(0)
    alone = Plain()
    inject(alone.get_submodule(getattr(kind, "part", "")), CONFIG)
    make_trainer(tmp_path, lora()).fit(alone, loader(), loader(seed=6))
    expected = whole_state(alone)
    for losses, state in world().run(fit, tmp_path, kind):
        assert losses == pytest.approx(alone.losses, rel=1e-5)
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
        assert_same_bits(base_of(state), base_of(expected))


def materialised(path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    # Of the base's reset_parameters, on the CPU.
    warnings.filterwarnings("ignore", "DTensor random operators may not")
    model = OnMetaByLightning()
    model_parallel(path, lora(), max_epochs=0).fit(model, *data())
    assert not any(parameter.is_meta for parameter in model.parameters())
    return whole_state(model)


@pytest.mark.slow
def test_factors_of_meta_layers_start_as_others(tmp_path):
    torch.manual_seed(0)
    here = Plain()
    inject(here, CONFIG)
    first, second = world().run(materialised, tmp_path)
    factors = {name: value for name, value in here.state_dict().items() if "lora_" in name}
    assert any(value.any() for value in factors.values())
    for state in (first, second):
        assert_same_bits({name: state[name] for name in factors}, factors)
        assert all(value.isfinite().all() for value in state.values())


class BuildsAndShards(Sharded):
    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()
        super().configure_model()


def too_late(path: Path) -> str:
    model = BuildsAndShards()
    del model.net
    with pytest.raises(LoRAError) as caught:
        model_parallel(path, lora()).fit(model, *data())
    net = shard_(network())
    with pytest.raises(LoRAError, match="is sharded already"):
        inject(net, LINEAR)
    assert type(net[0]).__name__ == "FSDPLinear"
    return str(caught.value)


def test_layers_sharded_before_injection_are_refused(tmp_path):
    message = world().run(too_late, tmp_path)[0]
    assert "'net.0'" in message
    assert "before fully_shard" in message


# --- views, files, refusals ---


def views(path: Path) -> None:
    net, alone = shard_(injected()), injected()
    before = whole_state(net)
    with disable_adapter(net):
        torch.testing.assert_close(net(X), network()(X))
    net(X)  # the root now shows gathered weights
    with merged(net):
        assert all(isinstance(value, DTensor) for value in adapter_state_dict(net).values())
        assert_same_bits(whole_state(net), before)
        with disable_adapter(net):
            torch.testing.assert_close(net(X), network()(X))
        assert is_merged(net)
        save_adapter(net, path / "adapter")
        other = {name: value * 2 for name, value in net.state_dict().items() if "lora_" not in name}
        net.load_state_dict(other)  # a new base while merged
        assert is_merged(net)
    assert_same_bits(base_of(whole_state(net)), {name: value * 2 for name, value in base_of(before).items()})
    fresh = shard_(injected(config=LINEAR))
    for factor in adapters(fresh):
        torch.nn.init.zeros_(factor)
    with merged(fresh):
        load_adapter(fresh, path / "adapter")
    assert_same_bits(whole_state(fresh), before)
    fresh = network()
    load_adapter(fresh, path / "adapter")
    assert_same_bits(fresh.state_dict(), alone.state_dict())
    other = network()
    other[0].weight.data += 1
    inject(other, LINEAR)
    with pytest.raises(LoRAError, match=r"another base: values of '0\.weight'"):
        load_adapter(shard_(other), path / "adapter")


@pytest.mark.slow
def test_state_dicts_and_files_of_a_sharded_model_equal_those_of_one_device(tmp_path):
    world().run(views, tmp_path)


def refusals() -> None:
    net = shard_(injected())
    before = whole_state(net)
    for verb in (unload, merge_and_unload):
        with pytest.raises(LoRAError, match=rf"{verb.__name__}: FSDPSequential was sharded by fully_shard"):
            verb(net)
    assert_same_bits(whole_state(net), before)
    model = nn.Sequential(injected(), nn.Linear(3, 3))
    fully_shard(model)
    before = whole_state(model)
    merge(model[0])
    unmerge(model[0])
    model(X)  # gathered by the root, out of reach of its part
    with pytest.raises(LoRAError, match=r"outside of Sequential or in a forward .* Pass the module"):
        merge(model[0])
    merge(model)
    unmerge(model)
    assert_same_bits(whole_state(model), before)


def test_sharded_model_refuses_what_it_cannot_do():
    world().run(refusals)
