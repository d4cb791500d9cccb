"""How often one call visits every module, parameter or buffer of a model, which takes a while where it is large, and
that the call leaves nothing behind that keeps the model in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_lora import (
    adapter_state_dict,
    adapter_stats,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    lora_param_groups,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    save_merged,
    summary,
    take_adapter,
    unload,
    unmerge,
)
from support.models.networks import base_zoo, trained_zoo, zoo_config
from support.runs.recorders import counted_walks
from support.runs.shortcuts import without_collections


class Around(nn.Module):
    """A module around the injected one."""

    def __init__(self, zoo: nn.Module) -> None:
        super().__init__()
        self.zoo = zoo


def merged_zoo() -> nn.Module:
    merge(model := trained_zoo())
    return model


def use(model: nn.Module) -> None:
    with disable_adapter(model):
        pass


# Of each call: a model, what is called, and how many walks it takes at most.
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], Any], int]] = {
    "inject": (base_zoo, lambda model, path: inject(model, zoo_config()), 1),
    "inject again": (trained_zoo, lambda model, path: inject(model, zoo_config()), 1),
    "unload": (trained_zoo, lambda model, path: unload(model), 1),
    "unload merged": (merged_zoo, lambda model, path: unload(model), 1),
    "merge": (trained_zoo, lambda model, path: merge(model), 1),
    "unmerge": (merged_zoo, lambda model, path: unmerge(model), 1),
    "is_merged": (merged_zoo, lambda model, path: is_merged(model), 1),
    "merge_and_unload": (trained_zoo, lambda model, path: merge_and_unload(model), 1),
    "disable_adapter": (trained_zoo, lambda model, path: use(model), 2),
    "adapter_state_dict": (trained_zoo, lambda model, path: adapter_state_dict(model), 1),
    "merged_state_dict": (trained_zoo, lambda model, path: merged_state_dict(model), 2),
    "save_adapter": (trained_zoo, lambda model, path: save_adapter(model, path / "new"), 1),
    "save_merged": (trained_zoo, lambda model, path: save_merged(model, path / "new"), 2),
    "take_adapter": (trained_zoo, lambda model, path: take_adapter(model), 1),
    "load_adapter": (trained_zoo, lambda model, path: load_adapter(model, path / "adapter"), 1),
    "load_adapter onto a merged model": (merged_zoo, lambda model, path: load_adapter(model, path / "adapter"), 1),
    "load_adapter onto a plain model": (base_zoo, lambda model, path: load_adapter(model, path / "adapter"), 1),
    "adapter_stats": (trained_zoo, lambda model, path: adapter_stats(model), 1),
    "summary": (trained_zoo, lambda model, path: summary(model), 1),
    "lora_param_groups": (trained_zoo, lambda model, path: lora_param_groups(model, lr=1e-3), 1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("saved")
    save_adapter(trained_zoo(), path / "adapter")
    return path


@pytest.mark.parametrize("name", CALLS)
def test_a_call_walks_the_model_no_more_often_than_is_listed_and_keeps_nothing_of_it(saved: Path, name: str):
    """The memory of a device is full long before Python collects garbage, which it does by the number of objects."""
    build, call, most = CALLS[name]
    with without_collections():
        model = build()
        with counted_walks(model) as walks:
            call(model, saved)
        parameters = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not any(parameter() is not None for parameter in parameters)
    assert 0 < sum(walks.values()) <= most, walks


# A call of each way to find the module inside that was injected.
AROUND = ["merge", "unload merged", "disable_adapter", "merged_state_dict", "save_adapter", "load_adapter", "summary"]


@pytest.mark.parametrize("name", AROUND)
def test_a_call_with_a_module_around_the_injected_one_walks_that_no_more_often(saved: Path, name: str):
    build, call, most = CALLS[name]
    model = Around(inner := build())
    with counted_walks(model, inner) as walks:
        call(model, saved)
    assert 0 < sum(walks.values()) <= most, walks


def test_walks_are_counted_once_each_by_who_began_them():
    model = base_zoo()
    with counted_walks(model) as walks:
        list(model.parameters())
        model.state_dict()
        list(model.body.modules())
    assert sum(walks.values()) == 2
    assert {walk.split()[0] for walk in walks} == {"parameters", "state_dict"}
