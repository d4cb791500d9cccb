"""An adapted layer that is not in the model any more: every function that would ignore that names it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    unload,
)
from support.covering import covering
from support.models.networks import Zoo, base_zoo, checkpoint, same, trained_zoo

USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "merge": lambda model, path: merge(model),
    "merged": lambda model, path: merged(model).__enter__(),
    "merge_and_unload": lambda model, path: merge_and_unload(model),
    "adapter_state_dict": lambda model, path: adapter_state_dict(model),
    "merged_state_dict": lambda model, path: merged_state_dict(model),
    "save_adapter": lambda model, path: save_adapter(model, path / "adapter"),
    "save_merged": lambda model, path: save_merged(model, path / "merged"),
    "adapter checkpoint": lambda model, path: checkpoint(model, "adapter"),
    "merged checkpoint": lambda model, path: checkpoint(model, "merged"),
    "full checkpoint": lambda model, path: checkpoint(model, "full"),
}


class Around(nn.Module):
    def __init__(self, zoo: Zoo) -> None:
        super().__init__()
        self.zoo = zoo


@pytest.mark.parametrize(
    ("use", "handle"), covering([*USES], ["the injected module", "one around it", "a copy"], meet=1)
)
def test_a_replaced_layer_is_named_by(tmp_path: Path, use: str, handle: str):
    model = trained_zoo()
    model.body[3] = nn.Linear(8, 8)
    given = {"the injected module": model, "one around it": Around(model), "a copy": copy.deepcopy(model)}[handle]
    message = r"'body\.3' in Zoo was adapted, but is now a torch\.nn.*\.Linear without .*1 of 4"
    with pytest.raises(LoRAError, match=message):
        USES[use](given, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", USES)
def test_a_model_without_any_of_its_adapted_layers_is_refused_by(tmp_path: Path, use: str):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, LoRAConfig(r=2))
    model[0], model[1] = nn.Linear(4, 4), nn.Identity()
    verb = "merge" if use == "merged" else use.split()[-1]
    message = rf"^{verb}: '0' in Sequential was adapted, but is now .*2 of 2 .*exclude_modules=\['0', '1'\]"
    with pytest.raises(LoRAError, match=message):
        USES[use](model, tmp_path)


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:lightning_lora. unload cannot bring back .*body.3.weight")  # the new layer's own
def test_unload_of_a_model_with_a_replaced_layer_leaves_that_and_restores_the_rest():
    model, fresh = trained_zoo(), base_zoo()
    model.body[3] = new = nn.Linear(8, 8)
    unload(model)
    assert model.body[3] is new
    assert all(same(model.get_parameter(name), p) for name, p in fresh.named_parameters() if "body.3" not in name)


@pytest.mark.core
def test_a_layer_that_was_moved_to_another_place_in_the_model_is_still_there(tmp_path: Path):
    model = trained_zoo(bias="none")
    tokens = torch.arange(5)[None]
    before = model(tokens)
    model.body = nn.Sequential(*model.body[:3], nn.Sequential(model.body[3]))
    with merged(model):
        torch.testing.assert_close(model(tokens), before)
    save_adapter(model, tmp_path / "adapter")
