"""Full checkpoints: of a part, and with damaged first values; a user's own entries; submodules that are compiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
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
    disable_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge_and_unload,
    save_adapter,
    take_adapter,
    unload,
)
from support.covering import covering
from support.files.expected_weights import merge_and_check
from support.runs.lightning_versions import PLAIN_TYPES_ONLY, WeightAveraging, weight_averaging
from support.runs.recorders import Recorder
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, outputs, seen, weights
from support.runs.with_callback import At, lora, trained


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
@pytest.mark.parametrize(("part", "what"), covering(PARTS, TRAINED, meet=1))
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
@pytest.mark.parametrize(("part", "is_injected"), [("", True), ("body", False)])
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


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full")
    trained(path, Net(), lora(save="full", bias="all")).trainer.save_checkpoint(path / "full.ckpt")
    return path / "full.ckpt"


@pytest.mark.parametrize(("case", "way"), covering(SPOILED, READS, meet=1))
def test_a_full_checkpoint_without_proper_first_values_is_refused_by_name(tmp_path, full: Path, case: str, way: str):
    content = torch.load(full, weights_only=True)
    SPOILED[case](content["lora"])
    torch.save(content, path := tmp_path / "full.ckpt")
    with pytest.raises(LoRAError, match="initial"):
        READS[way](path)


@pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen")
def test_a_full_checkpoint_of_a_weight_without_a_first_value_loads_and_the_weight_is_named(tmp_path):
    unfreeze = At("on_after_backward", lambda trainer, module: module.head.bias.requires_grad_(True))
    model = Net()
    fit_model(tmp_path, model, LoRACallback(r=2, save="full"), unfreeze, saved=tmp_path / "full.ckpt")
    assert not torch.equal(model.head.bias, Net().head.bias)
    loaded = load_from_checkpoint(Net, tmp_path / "full.ckpt")
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.warns(UserWarning, match=r"unload cannot bring back .* \(head.bias\), and leaves it as it is"):
        unload(loaded)
    assert torch.equal(loaded.head.bias, model.head.bias)


# --- entries that the user adds ---


Entry = Callable[[nn.Module], dict[str, Any]]
ENTRIES: dict[str, Entry] = {
    "of one weight": lambda model: {"head.weight": torch.full_like(model.head.weight, 0.5).detach()},
    "of every parameter": lambda model: {n: torch.full_like(p, 0.5).detach() for n, p in model.named_parameters()},
    "nested": lambda model: {
        "tasks": {"first": {"body.3.weight": torch.full_like(model.body[3].weight, 0.5).detach()}}
    },
    "of what is trained": lambda model: {n: t.clone().fill_(1) for n, t in adapter_state_dict(model).items()},
}


class Remembers(Net):
    """Keeps an entry of its own, as for elastic weight consolidation."""

    def __init__(self, entry: str = "of one weight") -> None:
        super().__init__()
        self.entry = entry
        self.found: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fisher"] = ENTRIES[self.entry](self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["fisher"]


class RemembersBeside(L.Callback):
    """The same in a callback's state."""

    def __init__(self, entry: str, model: nn.Module) -> None:
        self.make = functools.partial(ENTRIES[entry], model)

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.make()}


@pytest.mark.parametrize(("entry", "kind"), covering(ENTRIES, ["adapter", "merged", "full"], meet=1))
def test_an_entry_that_the_module_or_a_callback_adds_is_saved_and_comes_back_as_it_was(tmp_path, entry: str, kind: str):
    model = Remembers(entry)
    trained(tmp_path, model, lora(save=kind), RemembersBeside(entry, model))
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["fisher"], ENTRIES[entry](model))
    assert_same_tensors(saved["callbacks"]["RemembersBeside"]["fisher"], ENTRIES[entry](model))
    resumed = Remembers(entry)
    trainer = make_trainer(tmp_path, lora(save=kind), RemembersBeside(entry, resumed), max_epochs=2)
    trainer.fit(resumed, Data(), ckpt_path=tmp_path / "own.ckpt")
    assert_same_tensors(resumed.found, ENTRIES[entry](model))


@weight_averaging
def test_an_entry_stays_while_the_copies_of_weight_averaging_lose_their_frozen_weights(tmp_path):
    model = trained(tmp_path, Remembers(), lora(), WeightAveraging())
    model.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_same_tensors(saved["fisher"], ENTRIES["of one weight"](model))
    assert saved["current_model_state"].keys() == saved["state_dict"].keys()
    assert not saved["state_dict"].keys() & dict(Net().named_parameters()).keys()


# --- a submodule that __init__ compiles ---


class Compiled(Net):
    """As programs write it; nothing is compiled before it runs, and here it runs without."""

    def prepare(self) -> None:
        super().prepare()
        self.body = torch.compile(self.body, backend=Recorder())


@pytest.fixture
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def saved(path: Path, kind: str) -> tuple[Net, Path]:
    fit_model(path, model := Compiled(width=7, seed=4), lora(save=kind), saved=path / "saved.ckpt")
    return model, path / "saved.ckpt"


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("kind", ["full", "merged"])
def test_checkpoint_has_the_modules_own_names_and_is_read_by_the_class_and_by_one_that_is_not_compiled(tmp_path, kind):
    model, file = saved(tmp_path, kind)
    own = Compiled() if kind == "merged" else model
    assert list(torch.load(file, weights_only=True)["state_dict"]) == list(own.state_dict())
    for cls in (Compiled, Net):
        assert torch.equal(outputs(load_from_checkpoint(cls, file)), outputs(model))
    if kind == "merged":
        plain = Compiled.load_from_checkpoint(file, strict=True, **PLAIN_TYPES_ONLY)
        merge_and_unload(model)
        assert_same_tensors(dict(plain.state_dict()), dict(model.state_dict()))


@pytest.mark.usefixtures("_eager")
def test_command_merges_into_a_checkpoint_with_the_segments_of_a_wrapper(tmp_path):
    fit_model(tmp_path, Compiled(width=7, seed=4), saved=tmp_path / "base.ckpt")
    model = Compiled.load_from_checkpoint(tmp_path / "base.ckpt", **PLAIN_TYPES_ONLY)
    make_trainer(tmp_path, lora()).fit(model, Data())
    save_adapter(model, tmp_path / "adapter")
    merge_and_check(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "merged.ckpt")
    merged = Compiled.load_from_checkpoint(tmp_path / "merged.ckpt", strict=True, **PLAIN_TYPES_ONLY)
    merge_and_unload(model)
    assert_same_tensors(dict(merged.state_dict()), dict(model.state_dict()))
