"""A LoRACallback in Fabric's list, where nothing calls its hooks."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, LoRAError, adapter_stats, inject, merged, save_adapter


def fabric_with_callback() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, callbacks=[LoRACallback(r=2, target_modules=["0"])])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2))


def test_callback_in_fabrics_list_is_an_error_at_the_first_step_after_setup_module():
    """Fabric calls nothing earlier there."""
    fabric, model = fabric_with_callback(), network()
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters()))
    fabric.backward(model(torch.ones(1, 3)).sum())
    with pytest.raises(LoRAError, match=r"^LoRACallback: Fabric calls no hook of a Trainer"):
        optimizer.step()


def test_calls_that_the_error_shows_do_what_the_callback_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoRAError) as refused:
        fabric_with_callback().setup(network())
    shown = re.findall(r"`([^`]+)`", str(refused.value))
    assert shown == [
        "inject(model, LoRAConfig(r=2, target_modules=('0',)))",
        "with merged(model):",
        "save_adapter(model, path)",
    ]
    model, fabric = network(), Fabric(accelerator="cpu", devices=1)
    names = {"model": model, "path": "adapter", "inject": inject, "LoRAConfig": LoRAConfig}
    exec(shown[0], names)
    names |= {"model": fabric.setup(model), "merged": merged, "save_adapter": save_adapter}
    exec("\n".join([f"{shown[1]} pass", shown[2]]), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert adapter_stats(names["model"]).snapshots.keys() == {"0"}
