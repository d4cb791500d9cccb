"""What was trained whole without any layer: taken, loaded by names, and refused where PEFT has no file for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    export_adapter,
    inject,
    load_adapter,
    plot_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.command.info import info
from lightning_lora.command.merge import merge_on_disk
from support.models.networks import checkpoint
from support.runs.training import Net, inputs, outputs

HEAD = LoRAConfig(target_modules=[], modules_to_save=["head"])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


def trained(model: Any, by: float = 0.5) -> Any:
    """Inject a model, and change its head as training would."""
    inject(model, HEAD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by) if parameter.requires_grad else None
    return model


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_a_checkpoint_holds_the_head_and_is_loaded_onto_new_models(tmp_path: Path, kind: str):
    model = trained(Network())
    torch.save(content := checkpoint(model, kind), tmp_path / "head.ckpt")
    assert (content["state_dict"].keys() == {"head.weight", "head.bias"}) == (kind == "adapter")
    new = Network()
    assert load_adapter(new, tmp_path / "head.ckpt") == []
    assert torch.equal(new(inputs()), model(inputs()))
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    load_adapter(new, take_adapter(trained(Network(), by=2.0)))  # in place of the one that is there
    assert torch.equal(new(inputs()), trained(Network(), by=2.0)(inputs()))


@pytest.mark.parametrize(("there", "here"), [("net.", ""), ("", "net."), ("net.", "model.")])
def test_it_is_loaded_by_names_under_another_prefix(there: str, here: str):
    def around(prefix: str) -> Any:
        module = L.LightningModule()
        module.add_module(prefix[:-1], Network()) if prefix else None
        return module if prefix else Network()

    load_adapter(new := around(here), take_adapter(trained(around(there))))
    assert torch.equal(new.get_parameter(f"{here}head.weight"), trained(Network()).head.weight)


def test_heads_of_lightning_modules_are_averaged_in_memory():
    one, other = (take_adapter(trained(Net(), by=by)) for by in (0.5, 1.5))
    load_adapter(model := Net(), combine([one, other], [0.5, 0.5]))
    torch.testing.assert_close(outputs(model), outputs(trained(Net(), by=1.0)))


def test_a_cut_adapter_with_layers_is_no_head():
    inject(model := Network(), LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    content = checkpoint(model, "adapter")
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if "lora" not in name}
    content["lora"]["layers"] = []
    with pytest.raises(LoRAError, match="holds no lora_A"):
        load_adapter(Network(), content)


def test_peft_has_no_file_for_it_and_the_remedy_is_named(tmp_path: Path):
    model = trained(Network())
    torch.save(checkpoint(model, "adapter"), tmp_path / "head.ckpt")
    for write in (
        lambda: save_adapter(model, tmp_path / "folder"),
        lambda: save_adapter(take_adapter(model), tmp_path / "folder"),
        lambda: export_adapter(tmp_path / "head.ckpt", tmp_path / "folder"),
        lambda: export_adapter(tmp_path / "head.ckpt", tmp_path / "folder", plain=True),
    ):
        with pytest.raises(LoRAError, match=r"save_merged\(model, path\)"):
            write()
    with pytest.raises(LoRAError, match="no adapted layer"):
        plot_adapter(model, output=tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["head.ckpt"]


def test_the_command_shows_it_and_merges_it(tmp_path: Path):
    model, torch_file = trained(Network()), tmp_path / "head.ckpt"
    torch.save(checkpoint(model, "adapter"), torch_file)
    torch.save(Network().state_dict(), tmp_path / "base.pt")
    found = info(torch_file)
    assert (found["layers"], found["also_trained"]) == ({}, {"head.weight": [3, 8], "head.bias": [3]})
    merge_on_disk(tmp_path / "base.pt", torch_file, tmp_path / "merged.pt")
    written = torch.load(tmp_path / "merged.pt")
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())
