"""Full checkpoints: of a model of which a part was injected, and with initial values that are missing or damaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    take_adapter,
    unload,
)
from support.runs import At, lora, trained
from support.training import Data, Net, assert_same_tensors, make_trainer, outputs, seen, weights


class AllInOne(Net):
    """Everything that it has is in one attribute."""

    def prepare(self) -> None:
        super().prepare()
        self.net = nn.Sequential(self.body, self.head)
        del self.body, self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


class Twofold(Net):
    """A second part has a layer of the same name."""

    def prepare(self) -> None:
        super().prepare()
        self.other = nn.Sequential(copy.deepcopy(self.body[3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.other(self.body(x)))
        return result


PARTS: dict[str, tuple[type[Net], str, Any]] = {
    "all, a list": (AllInOne, "net", ["0.0", "0.3"]),
    "all, an expression": (AllInOne, "net", r"0\.[03]|1"),
    "a part, a list": (Net, "body", ["0", "3"]),
    "a part, an expression": (Net, "body", "[03]"),
    "a part, names of more at the root": (Twofold, "body", ["0", "3"]),
}
TRAINED = {
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "nothing but buffers": {},
}


@pytest.mark.filterwarnings("ignore:lightning_lora. [a-z_]+ cannot bring back")  # what was trained beside the part
@pytest.mark.parametrize("what", TRAINED)
@pytest.mark.parametrize("part", PARTS)
def test_load_from_checkpoint_of_a_full_checkpoint_of_a_part_brings_back_the_base_of_the_part(
    tmp_path, part: str, what: str
):
    cls, name, targets = PARTS[part]
    model = cls()
    with torch.no_grad():  # a base that the class does not build: it comes from the file
        for parameter in model.parameters():
            parameter.mul_(1.25)
    net = model.get_submodule(name)
    before = weights(net)
    inject(net, LoRAConfig(r=2, target_modules=targets, **TRAINED[what]))
    trained(tmp_path, model, LoRACallback(save="full"))
    model.trainer.save_checkpoint(tmp_path / "full.ckpt")
    assert any(not torch.equal(net.state_dict()[n], value) for n, value in before.items() if "lora" not in n)

    loaded = load_from_checkpoint(cls, tmp_path / "full.ckpt")
    assert torch.equal(outputs(loaded), outputs(model))
    with disable_adapter(model), disable_adapter(loaded):
        assert torch.equal(outputs(loaded), outputs(model))
        found = seen(loaded.get_submodule(name))
        assert_same_tensors({n: found[n].detach() for n in before}, before)
    for trained_model in (model, loaded):
        unload(trained_model)
        assert_same_tensors(trained_model.get_submodule(name).state_dict(), before)
    assert_same_tensors(weights(loaded), weights(model))


@pytest.mark.filterwarnings("ignore:lightning_lora. adapter. belongs to another base")
@pytest.mark.parametrize("is_injected", [True, False])
@pytest.mark.parametrize("part", ["", "body"])
def test_load_adapter_takes_from_a_full_checkpoint_what_an_adapter_checkpoint_has_and_refuses_another_base(
    tmp_path, part: str, is_injected: bool
):
    """The base of a full checkpoint is never taken, not even a part of it; load_from_checkpoint takes all of it."""

    def options() -> LoRAConfig:
        names = ["0", "3"] if part else ["body.0", "body.3"]
        return LoRAConfig(r=2, target_modules=names, bias="lora_only", modules_to_save=None if part else ["head"])

    inject((model := Net()).get_submodule(part), options())
    trained(tmp_path, model, LoRACallback(save="full"))
    model.trainer.save_checkpoint(tmp_path / "full.ckpt")
    alone = take_adapter(model)
    found = []
    for source in (tmp_path / "full.ckpt", alone):
        with torch.no_grad():
            for tensor in (*(other := Net()).parameters(), *other.buffers()):
                tensor.mul_(2)
        if is_injected:
            inject(other.get_submodule(part), options())
        before = weights(other)
        with pytest.raises(LoRAError, match=r"belongs to another base: .* 'body.0.weight'"):
            load_adapter(other, source)
        assert_same_tensors(weights(other), before)
        load_adapter(other, source, strict_base=False)
        found.append(weights(other))
    assert_same_tensors(found[0], found[1])
    own = {name for name, value in before.items() if "lora" not in name and name not in alone.tensors}
    assert "body.1.weight" in own
    assert_same_tensors({name: found[0][name] for name in own}, {name: before[name] for name in own})
    assert_same_tensors({name: found[0][name] for name in alone.tensors}, alone.tensors)
    assert_same_tensors(weights(load_from_checkpoint(Net, tmp_path / "full.ckpt")), weights(model))


def _put(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.update(initial=value)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta["initial"].update({name: value})


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda meta: meta.pop("initial"),
    "None": _put(None),
    "a list": _put([torch.zeros(8)]),
    "text": _put("initial"),
    "a value of another shape": _set("body.1.running_mean", torch.zeros(3)),
    "a value that is no tensor": _set("body.1.running_mean", [0.0] * 8),
}
READS: dict[str, Callable[[Path], Any]] = {
    "load_from_checkpoint": lambda path: load_from_checkpoint(Net, path),
    "resume": lambda path: make_trainer(path.parent, lora(), max_epochs=2).fit(Net(), Data(), ckpt_path=path),
    "test": lambda path: make_trainer(path.parent, lora()).test(Net(), Data(), ckpt_path=path, verbose=False),
}


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("case", SPOILED)
def test_a_full_checkpoint_without_proper_first_values_is_refused_by_name(tmp_path, case: str, way: str):
    path = tmp_path / "full.ckpt"
    trained(tmp_path, Net(), lora(save="full", bias="all")).trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    SPOILED[case](content["lora"])
    torch.save(content, path)
    with pytest.raises(LoRAError, match="initial"):
        READS[way](path)


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen")
def test_a_full_checkpoint_of_a_weight_without_a_first_value_loads_and_the_weight_is_named(tmp_path):
    unfreeze = At("on_after_backward", lambda trainer, module: module.head.bias.requires_grad_(True))
    model = Net()
    trainer = make_trainer(tmp_path, LoRACallback(r=2, save="full"), unfreeze)
    trainer.fit(model, Data())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    assert not torch.equal(model.head.bias, Net().head.bias)
    loaded = load_from_checkpoint(Net, tmp_path / "full.ckpt")
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.warns(UserWarning, match=r"unload cannot bring back .* \(head.bias\), and leaves it as it is"):
        unload(loaded)
    assert torch.equal(loaded.head.bias, model.head.bias)
