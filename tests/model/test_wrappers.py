"""Wrappers of torch and Lightning are accepted like the network inside: the same names, values and files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    adapter_stats,
    disable_adapter,
    initialize_from_data,
    inject,
    is_merged,
    load_adapter,
    lora_param_groups,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    summary,
    unload,
    unmerge,
)
from lightning_lora.model.adapted_model import find_adapted
from lightning_lora.nn.lora_layer import LoRALayer

Wrap = Callable[[nn.Module], nn.Module]

CONFIG = LoRAConfig(r=2, target_modules=["0", "2"])


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_fabric(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = Fabric(accelerator="cpu", devices=1).setup(model)
    return wrapped


def with_fabric_and_ddp(model: nn.Module) -> nn.Module:
    """As Fabric(strategy="ddp").setup does."""
    strategy = with_fabric(nn.Identity())._strategy
    return _FabricModule(DistributedDataParallel(model), strategy, original_module=model)


def compiled(model: nn.Module) -> nn.Module:
    result: nn.Module = torch.compile(model, backend="eager")
    return result


KNOWN: dict[str, Wrap] = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": compiled,
    "checkpoint_wrapper": checkpoint_wrapper,
    "Fabric of DDP": with_fabric_and_ddp,
    "AveragedModel of DDP of compile": lambda model: AveragedModel(DistributedDataParallel(compiled(model))),
}
known = pytest.mark.parametrize("wrap", KNOWN.values(), ids=KNOWN)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def network(*, trained: bool = True) -> nn.Sequential:
    inject(net := plain(), CONFIG)
    if trained:
        draw(net, seed=1)
    return net


def draw(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def x() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@known
def test_views_and_files_of_a_wrapper_are_those_of_the_network_inside(tmp_path: Path, wrap: Wrap):
    model, net = wrap(network()), network()
    assert_same(adapter_state_dict(model), adapter_state_dict(net))
    assert_same(merged_state_dict(model), merged_state_dict(net))
    for name, each in (("wrapped", model), ("plain", net)):
        save_adapter(each, tmp_path / name / "adapter")
        save_merged(each, tmp_path / name / "merged")
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    assert str(summary(model)) == str(summary(net))
    assert adapter_stats(model).snapshots.keys() == adapter_stats(net).snapshots.keys()
    ours, groups = lora_param_groups(model, lr=1), lora_param_groups(net, lr=1)
    assert [(each["name"], len(each["params"])) for each in ours] == [(e["name"], len(e["params"])) for e in groups]


@known
def test_merging_disabling_and_loading_reach_the_network(tmp_path: Path, wrap: Wrap):
    model = wrap(network())
    factored = model(x())
    merge(model)
    assert is_merged(model)
    torch.testing.assert_close(model(x()), factored, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert not is_merged(model)
    with merged(model) as same:
        assert same is model
        assert is_merged(model)
    with disable_adapter(model) as same:
        assert same is model
        assert torch.equal(model(x()), plain()(x()))
    assert torch.equal(model(x()), factored)
    save_adapter(network(), tmp_path)
    for other in (wrap(network(trained=False)), wrap(plain())):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lightning_lora: load_adapter: DistributedDataParallel")
            assert load_adapter(other, tmp_path) == ["0", "2"]
        torch.testing.assert_close(other(x()), network()(x()))


@known
def test_unload_and_merge_and_unload_leave_plain_layers_in_the_wrapper(wrap: Wrap):
    model, other = wrap(network()), wrap(network())
    unload(model)
    assert torch.equal(model(x()), plain()(x()))
    assert merge_and_unload(other) is other
    torch.testing.assert_close(other(x()), network()(x()), atol=1e-5, rtol=1e-5)
    for each in (model, other):
        assert not any(isinstance(module, LoRALayer) for module in each.modules())
        assert find_adapted(each) is None


@known
def test_a_wrapper_starts_from_data_as_the_network_does(wrap: Wrap):
    batches = [torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    config = LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights="eva")
    for each in (inside := [plain(), plain()]):
        inject(each, config)
    model, net = wrap(inside[0]), inside[1]
    initialize_from_data(model, batches)
    initialize_from_data(net, batches)
    assert_same(adapter_state_dict(model), adapter_state_dict(net))


def test_an_average_is_saved_as_what_it_is_and_not_as_the_live_adapter(tmp_path: Path):
    live = network()
    average = AveragedModel(live, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in (3, 4):
        draw(live, seed)
        average.update_parameters(live)
    save_adapter(average, tmp_path / "adapter")
    save_merged(average, tmp_path / "merged")
    load_adapter(ours := plain(), tmp_path / "adapter")
    assert torch.equal(ours(x()), average(x()))
    assert not torch.allclose(ours(x()), live(x()), atol=1e-2)
    (base := plain()).load_state_dict(load_file(tmp_path / "merged/model.safetensors"))
    torch.testing.assert_close(base(x()), average(x()), atol=1e-5, rtol=1e-5)


class Lit(L.LightningModule):
    """Its one attribute has the name that wrappers give to what is inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x)


class Holder(nn.Module):
    """As timm's average of a model: a wrapper that nobody here has heard of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("none", "DataParallel"), ("DistributedDataParallel", "compile"), ("Fabric of DDP", "none"), ("compile", "none")],
)
def test_a_lightning_module_writes_its_network_whatever_is_around_either(tmp_path: Path, outer: str, inner: str):
    ways, net = KNOWN | {"none": lambda model: model}, network()
    model = ways[outer](Lit(ways[inner](net)))
    save_adapter(model, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names == {f"base_model.model.{layer}.lora_{factor}.weight" for layer in "02" for factor in "AB"}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_flat_shards_are_refused_by_name(tmp_path: Path):
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(LoRAError, match=r"^save_adapter: FullyShardedDataParallel"):
        save_adapter(model, tmp_path)


def injected_whole() -> nn.Module:
    inject(model := Holder(plain()), LoRAConfig(r=2, target_modules=["module.0", "module.2"]))
    return model


def a_part_of_what_was_injected() -> nn.Module:
    model = nn.ModuleDict({"held": Holder(plain())})
    inject(model, LoRAConfig(r=2, target_modules=["0", "2"]))
    part = model["held"]
    part.keeps_alive = lambda: model  # type: ignore[assignment]
    return part


class Siamese(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.left = self.right = net


@pytest.mark.parametrize(
    "handle",
    [
        injected_whole,
        a_part_of_what_was_injected,
        lambda: Siamese(network()),
        lambda: Lit(network()),
        lambda: Holder(network()),
    ],
)
def test_a_module_of_the_users_is_no_wrapper(tmp_path: Path, handle: Callable[[], nn.Module]):
    model = handle()
    for verb in (merge, is_merged, unmerge, adapter_state_dict, summary):
        verb(model)
    save_adapter(model, tmp_path / "adapter")
    save_merged(model, tmp_path / "merged")
    assert next(iter(adapter_state_dict(model))) in model.state_dict()


@pytest.mark.parametrize(
    ("verb", "wrap"),
    [("inject", lambda model: compiled(DistributedDataParallel(model))), ("load_adapter", with_fabric_and_ddp)],
)
def test_adapting_inside_what_synchronises_gradients_warns(tmp_path: Path, wrap: Wrap, verb: str):
    save_adapter(network(), tmp_path)
    act = {"inject": lambda m: inject(m, CONFIG), "load_adapter": lambda m: load_adapter(m, tmp_path)}[verb]
    with pytest.warns(UserWarning, match=f"lightning_lora: {verb}: DistributedDataParallel was put around"):
        assert act(wrap(plain())) == ["0", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act(wrap(network()))
