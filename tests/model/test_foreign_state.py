"""What a module writes into state_dict() of its own is in every kind of checkpoint, and comes back to the module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import (
    LoRAError,
    adapter_state_dict,
    load_adapter,
    load_from_checkpoint,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    save_merged,
    take_adapter,
)
from support.covering import covering
from support.runs.training import FEATURES, Data, Net, assert_same_tensors, make_trainer
from support.runs.with_callback import lora, trained

SAVED, BUILT = 7, 3  # what is marked in the model that is saved, and in each new one


class Marked(Net):
    """Its state outside of parameters and buffers depends on one number."""

    def prepare(self) -> None:
        super().prepare()
        self.mark(BUILT)

    def mark(self, number: int) -> None:
        raise NotImplementedError

    def marked(self) -> Any:
        raise NotImplementedError


class PersistentMetrics(Marked):
    """A tensor and a list of tensors."""

    def prepare(self) -> None:
        self.total, self.all = torchmetrics.SumMetric(), torchmetrics.CatMetric()
        self.total.persistent(True)
        self.all.persistent(True)
        super().prepare()

    def mark(self, number: int) -> None:
        for metric in (self.total, self.all):
            metric.reset()
            for value in range(number):
                metric.update(value)

    def marked(self) -> Any:
        return self.total.sum_value.item(), [value.item() for value in self.all.value]


class PackedLinear(nn.Module):
    """A frozen layer of another library: no parameters, no buffers, an entry that is no tensor, and one of autograd's.

    hqq's HQQLinear keeps a scale that was computed from a weight with gradients.
    """

    _version = 3

    def pack(self, number: int) -> None:
        self.codes, self.meta = torch.full((FEATURES, FEATURES), number, dtype=torch.uint8), {"bits": number}
        self.scale = nn.Parameter(torch.ones(())) / number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.float() * self.scale.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + "codes": self.codes, prefix + "meta": self.meta, prefix + "scale": self.scale}

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        assert metadata["version"] == 3
        self.codes, self.meta, self.scale = (state.pop(prefix + name) for name in ("codes", "meta", "scale"))
        super()._load_from_state_dict(state, prefix, metadata, *args)


class InFront(Marked):
    """Its frozen first layer is no layer of torch's own."""

    make: Callable[[], nn.Module] = PackedLinear

    def prepare(self) -> None:
        self.front = type(self).make()
        super().prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.front(x))


class OwnSaveToStateDict(InFront):
    def mark(self, number: int) -> None:
        self.front.pack(number)

    def marked(self) -> Any:
        return self.front.codes.tolist(), self.front.meta, self.front.scale.item()


class LinearInPieces(nn.Linear):
    """As those of optimum-quanto: the weight is a parameter, and state_dict() has two pieces of it in its place."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(f"{prefix}weight")
        destination[f"{prefix}weight._data"] = weight.round()
        destination[f"{prefix}weight._rest"] = weight - weight.round()

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, *found: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state.pop(f"{prefix}weight._data") + state.pop(f"{prefix}weight._rest"))
        super()._load_from_state_dict(state, prefix, metadata, strict, *found)
        found[0][:] = [name for name in found[0] if name != f"{prefix}weight"]  # of what is missing


class WeightInPieces(InFront):
    make = functools.partial(LinearInPieces, FEATURES, FEATURES)

    def mark(self, number: int) -> None:
        with torch.no_grad():
            self.front.weight.fill_(number + 0.25)
            self.front.bias.fill_(1)

    def marked(self) -> Any:
        return self.front.weight.tolist()


class OwnStateDict(Marked):
    def mark(self, number: int) -> None:
        self.note = {"number": number}

    def marked(self) -> Any:
        return self.note

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state["note"] = self.note
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        self.note = state_dict.pop("note")
        return super().load_state_dict(state_dict, *args, **kwargs)


def write_count(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    state[f"{prefix}count"] = torch.tensor(module.count)


def take_count(module: Any, state: Any, prefix: str, *args: Any) -> None:
    module.count = state.pop(f"{prefix}count").item()


class Hooks(Marked):
    def prepare(self) -> None:
        self.counting: list[Any] = []  # no submodule of its own: a test wraps the body
        super().prepare()
        self.body.register_state_dict_post_hook(write_count)
        self.body.register_load_state_dict_pre_hook(take_count)

    def build_body(self) -> None:
        super().build_body()
        self.counting.append(self.body)

    def mark(self, number: int) -> None:
        self.counting[0].count = number

    def marked(self) -> Any:
        return self.counting[0].count


WAYS: list[type[Marked]] = [PersistentMetrics, OwnSaveToStateDict, WeightInPieces, OwnStateDict, Hooks]
KINDS = ["adapter", "merged", "full"]


def resume(way: type[Marked], kind: str, path: Path) -> Marked:
    model = way()
    make_trainer(path.parent, lora(save=kind), max_epochs=2).fit(model, Data(1), ckpt_path=path)
    return model


def validate(way: type[Marked], kind: str, path: Path) -> Marked:
    model = way()
    make_trainer(path.parent, lora(save=kind)).validate(model, Data(1), ckpt_path=path, verbose=False)
    return model


def from_checkpoint(way: type[Marked], kind: str, path: Path) -> Marked:
    return load_from_checkpoint(way, path)


def adapter_loaded(way: type[Marked], kind: str, path: Path) -> Marked:
    load_adapter(model := way(), path)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[type[Marked], str], Path]:
    @functools.cache
    def save(way: type[Marked], kind: str) -> Path:
        path = tmp_path_factory.mktemp(way.__name__)
        model = trained(path, way(), lora(save=kind))
        model.mark(SAVED)
        model.trainer.save_checkpoint(path / "own.ckpt")
        return path / "own.ckpt"

    return save


def expected(way: type[Marked]) -> Any:
    model = way()
    model.mark(SAVED)
    return model.marked()


class Around(nn.Module):
    def __init__(self, inside: Marked) -> None:
        super().__init__()
        self.inside = inside


LOADS = [resume, validate, from_checkpoint, adapter_loaded]


@pytest.mark.parametrize(
    ("way", "load", "kind"),
    covering([OwnSaveToStateDict], LOADS, KINDS)
    + covering([way for way in WAYS if way is not OwnSaveToStateDict], LOADS, KINDS, meet=1),
)
def test_what_a_module_writes_of_its_own_is_saved_and_handed_back(saved, way: type[Marked], kind: str, load: Any):
    loaded = load(way, kind, saved(way, kind))
    assert loaded.marked() == expected(way) != way().marked()


def written(model: nn.Module) -> set[str]:
    """The names that state_dict() has beside those of parameters and persistent buffers."""
    tensors = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    return set(model.state_dict()) - tensors


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_holds_foreign_entries_under_their_names_and_hands_them_to_other_models(saved, way: Any):
    state = torch.load(saved(way, "adapter"), weights_only=True)["state_dict"]
    (marked := way()).mark(SAVED)
    assert {name for name in state if "lora_" not in name} == written(marked) | dict(marked.named_buffers()).keys()
    model, other = (load_from_checkpoint(way, saved(way, "adapter")) for _ in range(2))
    other.mark(BUILT)
    other.load_state_dict(adapter_state_dict(model), strict=False)
    (plain := way()).load_state_dict(merged_state_dict(model))
    assert other.marked() == plain.marked() == expected(way)


def test_lightning_alone_loads_foreign_entries_of_a_merged_checkpoint(saved):
    path = saved(OwnSaveToStateDict, "merged")
    assert OwnSaveToStateDict.load_from_checkpoint(path).marked() == expected(OwnSaveToStateDict)


@pytest.mark.parametrize(("way", "merged_now"), [(PersistentMetrics, False), (OwnSaveToStateDict, True), (Hooks, True)])
def test_an_adapter_in_memory_holds_foreign_entries_and_does_not_change(saved, way: Any, merged_now: bool):
    model = load_from_checkpoint(way, saved(way, "adapter"))
    if merged_now:
        merge(model)
    taken = take_adapter(model)
    for _ in range(2):
        model.mark(BUILT)
        load_adapter(model, taken)
        assert model.marked() == expected(way)
    load_adapter(other := Around(inside := way()), taken)
    assert inside.marked() == expected(way)
    assert other.inside is inside


def test_an_entry_that_no_module_takes_is_an_error_that_names_it(saved):
    class Forgets(OwnStateDict):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return Net.load_state_dict(self, state_dict, *args, **kwargs)

    with pytest.raises(LoRAError, match=r"does not take what a module wrote.*'note'"):
        load_adapter(Forgets(), saved(OwnStateDict, "adapter"))


class Compiled(Hooks):
    def prepare(self) -> None:
        super().prepare()
        self.body = torch.compile(self.body, backend="eager")


class Checkpointed(Hooks):
    def prepare(self) -> None:
        super().prepare()
        self.body = checkpoint_wrapper(self.body)


WRAPPED = [(Compiled, Hooks), (Hooks, Compiled), (Hooks, Checkpointed), (Checkpointed, Checkpointed)]


@pytest.mark.parametrize(
    ("pair", "kind", "load"), covering(WRAPPED, ["adapter", "full"], [resume, adapter_loaded], meet=1)
)
def test_foreign_entries_come_to_a_module_inside_a_wrapper(saved, pair: Any, kind: str, load: Any):
    save_as, load_as = pair
    with torch.compiler.set_stance("force_eager"):
        assert load(load_as, kind, saved(save_as, kind)).marked() == SAVED


@pytest.mark.slow
def test_save_merged_writes_foreign_tensors_under_their_names_and_refuses_what_is_no_tensor(saved, tmp_path):
    model = load_from_checkpoint(Hooks, saved(Hooks, "adapter"))
    save_merged(model, tmp_path / "merged")
    (plain := Hooks()).load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert plain.marked() == SAVED
    assert_same_tensors(dict(plain.named_parameters()), dict(merge_and_unload(model).named_parameters()))
    model = load_from_checkpoint(OwnStateDict, saved(OwnStateDict, "adapter"))
    with pytest.raises(LoRAError, match="'note' is no tensor"):
        save_merged(model, tmp_path / "refused")


def test_a_peft_folder_says_what_it_leaves_out_and_loads(saved, tmp_path, caplog):
    model = load_from_checkpoint(Hooks, saved(Hooks, "adapter"))
    with caplog.at_level("INFO"):
        save_adapter(model, tmp_path / "folder")
    assert "body.count is left out" in caplog.text
    load_adapter(other := Hooks(), tmp_path / "folder")
    assert other.marked() == BUILT
    assert torch.equal(other.head.lora_B, model.head.lora_B)
