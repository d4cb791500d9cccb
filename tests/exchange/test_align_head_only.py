"""What was trained whole without any layer: taken, loaded by names, and refused where PEFT has no file for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    combine,
    export_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    plot_adapter,
    read_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.command.info import info
from lightning_lora.command.merge import merge_on_disk
from support.models import write
from support.training import Data, Net, inputs, make_trainer, outputs

HEAD = LoRAConfig(target_modules=[], modules_to_save=["head"])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(x)
        return result


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


def trained(model: nn.Module, by: float = 0.5) -> nn.Module:
    """Inject a model, and change its head as training would."""
    inject(model, HEAD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by) if parameter.requires_grad else None
    return model


def checkpoint(model: nn.Module, kind: str = "adapter") -> dict[str, Any]:
    content = {"state_dict": model.state_dict()}
    write(model, content, kind)
    return content


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_a_checkpoint_holds_the_head_and_is_loaded_onto_new_models(tmp_path: Path, kind: str):
    model = trained(Network())
    torch.save(content := checkpoint(model, kind), tmp_path / "head.ckpt")
    assert (content["state_dict"].keys() == {"head.weight", "head.bias"}) == (kind == "adapter")
    new = Network()
    assert load_adapter(new, tmp_path / "head.ckpt") == []
    assert torch.equal(new(inputs()), model(inputs()))
    assert [name for name, parameter in new.named_parameters() if parameter.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    load_adapter(new, take_adapter(trained(Network(), by=2.0)))  # in place of the one that is there
    assert torch.equal(new(inputs()), trained(Network(), by=2.0)(inputs()))


@pytest.mark.parametrize(("source", "target"), [(Lit, Network), (Network, Lit), (Lit, Other), (Network, Other)])
def test_it_is_loaded_by_names_under_another_prefix(source: type[nn.Module], target: type[nn.Module]):
    model, new = trained(source()), target()
    load_adapter(new, take_adapter(model))
    assert torch.equal(new(inputs()), model(inputs()))


def test_a_bare_state_dict_goes_into_a_model_of_its_names_and_a_part_of_it_does_not():
    model = trained(Network())
    bare, new = adapter_state_dict(model), Network()
    with pytest.raises(LoRAError, match="holds no lora_A"):
        load_adapter(new, bare)  # which tensors of it are the base's, nothing says
    inject(new, HEAD)
    load_adapter(new, bare)
    assert torch.equal(new(inputs()), model(inputs()))
    with pytest.raises(LoRAError, match=r"'head\.bias' is missing"):
        load_adapter(new, {"head.weight": bare["head.weight"]})


def test_a_head_of_another_base_or_shape_is_refused():
    adapter = take_adapter(trained(Network()))
    other = Network()
    with torch.no_grad():
        other.body.weight.add_(1.0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(LoRAError, match=r"body\.weight"):
        load_adapter(other, adapter)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    wider = Network()
    wider.head = nn.Linear(8, 4)
    with pytest.raises(LoRAError, match=r"'head\.weight' must have shape \(4, 8\)"):
        load_adapter(wider, adapter)
    with pytest.raises(LoRAError, match="'head'"):
        load_adapter(nn.Sequential(nn.Linear(6, 3)), adapter)


def test_it_is_swapped_for_an_adapter_with_layers_and_back():
    head, layers = take_adapter(trained(Network())), Network()
    inject(layers, LoRAConfig(r=2, target_modules=["body"], init_lora_weights=False))
    expected, model = layers(inputs()), Network()
    load_adapter(model, head)
    assert load_adapter(model, take_adapter(layers)) == ["body"]
    assert torch.equal(model(inputs()), expected)
    assert load_adapter(model, head) == []
    assert torch.equal(model(inputs()), trained(Network())(inputs()))


def test_a_cut_adapter_with_layers_is_no_head():
    inject(model := Network(), LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    content = checkpoint(model)
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if "lora" not in name}
    content["lora"]["layers"] = []
    with pytest.raises(LoRAError, match="holds no lora_A"):
        load_adapter(Network(), content)


def test_peft_has_no_file_for_it_and_the_remedy_is_named(tmp_path: Path):
    model = trained(Network())
    torch.save(checkpoint(model), tmp_path / "head.ckpt")
    refused = r"PEFT has no file .* save_merged\(model, path\), or keep the checkpoint"
    with pytest.raises(LoRAError, match=refused):
        save_adapter(model, tmp_path / "folder")
    with pytest.raises(LoRAError, match=refused):
        save_adapter(take_adapter(model), tmp_path / "folder")
    with pytest.raises(LoRAError, match=refused):
        export_adapter(tmp_path / "head.ckpt", tmp_path / "folder")
    with pytest.raises(LoRAError, match=r"save_merged\(model, path\)"):
        export_adapter(tmp_path / "head.ckpt", tmp_path / "folder", plain=True)
    with pytest.raises(LoRAError, match="no adapted layer; there is nothing to draw"):
        plot_adapter(model, output=tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["head.ckpt"]


def test_the_command_shows_it_and_merges_it(tmp_path: Path):
    model, torch_file = trained(Network()), tmp_path / "head.ckpt"
    torch.save(checkpoint(model), torch_file)
    torch.save(Network().state_dict(), tmp_path / "base.pt")
    found = info(torch_file)
    assert (found["layers"], found["also_trained"]) == ({}, {"head.weight": [3, 8], "head.bias": [3]})
    merge_on_disk(tmp_path / "base.pt", torch_file, tmp_path / "merged.pt")
    written = torch.load(tmp_path / "merged.pt")
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())


def test_heads_are_averaged_in_memory():
    one, other = (take_adapter(trained(Net(), by=by)) for by in (0.5, 1.5))
    load_adapter(model := Net(), combine([one, other], [0.5, 0.5]))
    torch.testing.assert_close(outputs(model), outputs(trained(Net(), by=1.0)))


def test_a_checkpoint_of_a_fit_is_read_in_each_way(tmp_path: Path):
    callback = LoRACallback(target_modules=[], modules_to_save=["head"], verbose=False)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model := Net(), Data())
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    assert not read_adapter(tmp_path / "head.ckpt").layers
    expected = outputs(model)
    assert torch.equal(outputs(load_from_checkpoint(Net, tmp_path / "head.ckpt")), expected)
    load_adapter(new := Net(), tmp_path / "head.ckpt")
    assert torch.equal(outputs(new), expected)
