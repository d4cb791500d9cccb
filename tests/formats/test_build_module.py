"""load_from_checkpoint of classes that read the file by themselves while they are built, as chemprop's MPNN does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRACallback, LoRAError, disable_adapter, load_from_checkpoint, unload
from support.lightning_versions import ANY_OBJECTS
from support.training import CLASSES, Data, Net, assert_same_tensors, make_trainer, outputs

KINDS = ("adapter", "merged", "full")


class Weighted(nn.Module):
    """A loss with a buffer."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y, weight=self.weights)


class WithLoss(Net):
    """The loss is a hyper-parameter, and so an object in the file."""

    def __init__(self, loss: Weighted, width: int = 8, seed: int = 1, lr: float = 0.05) -> None:
        super().__init__(width, seed, lr)
        self.criterion = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self(batch[0]), batch[1])


class ReadsItsFile(WithLoss):
    """Reads the file twice and unpickles all of it; the loss is built from its buffer. So does chemprop 2.3."""

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, strict: Any = True, **kwargs: Any
    ) -> Any:
        state = torch.load(checkpoint_path, map_location, weights_only=False)["state_dict"]
        kwargs["loss"] = Weighted(state["criterion.weights"] + 0)
        content = torch.load(checkpoint_path, map_location, weights_only=False)
        content["state_dict"] = state
        torch.save(content, buffer := io.BytesIO())
        buffer.seek(0)
        return super().load_from_checkpoint(buffer, map_location, hparams_file, strict, **ANY_OBJECTS, **kwargs)


class PassesOn(WithLoss):
    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        return super().load_from_checkpoint(*args, **kwargs)


class Sized(Net):
    """The head is as wide as the file's."""

    looked: list[str]

    def __init__(self, **unused: Any) -> None:  # without which Lightning builds no derived class
        super().__init__()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.looked = list(checkpoint["state_dict"])
        self.head = nn.Linear(8, len(checkpoint["state_dict"]["head.bias"]))
        nn.init.ones_(self.head.weight)


class SizedAgain(Sized):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        nn.init.constant_(self.head.bias, len(checkpoint["state_dict"]["head.bias"]))


def saved(path: Path, model: Net, kind: Any, **options: Any) -> Path:
    torch.manual_seed(0)
    trainer = make_trainer(path, LoRACallback(r=2, save=kind, **options))
    trainer.fit(model, Data())
    trainer.save_checkpoint(path / "saved.ckpt")
    return path / "saved.ckpt"


@pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")
@pytest.mark.parametrize("cls", [ReadsItsFile, PassesOn])
@pytest.mark.parametrize("kind", KINDS)
def test_class_with_its_own_load_from_checkpoint_is_loaded_onto_the_base_that_it_builds(tmp_path, kind: str, cls: Any):
    weights = torch.tensor([1.0, 2.0, 3.0])
    model = cls(Weighted(weights))
    file = saved(tmp_path, model, kind)
    loaded = load_from_checkpoint(cls, file, weights_only=False)
    assert torch.equal(outputs(loaded), outputs(model))
    assert_same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    fresh = cls(Weighted(weights))
    with disable_adapter(loaded):
        assert torch.equal(outputs(loaded), outputs(fresh))
    unload(loaded)
    assert_same_tensors(dict(loaded.state_dict()), dict(fresh.state_dict()))
    with pytest.raises(LoRAError, match="objects are not unpickled"):
        load_from_checkpoint(cls, file)


@pytest.mark.parametrize("kind", KINDS)
def test_class_that_sizes_a_layer_by_the_file_finds_the_plain_models_tensors_and_loads_none(tmp_path, kind: str):
    model = Sized()
    model.head = nn.Linear(8, CLASSES + 1)
    nn.init.ones_(model.head.weight)
    file = saved(tmp_path, model, kind, target_modules=["body.0"], modules_to_save=["head"])
    loaded = load_from_checkpoint(Sized, file)
    plain = [name for name in model.state_dict() if "lora_" not in name]
    in_adapter = [name for name in plain if name.startswith("head.") or "running" in name or "tracked" in name]
    assert sorted(loaded.looked) == sorted(in_adapter if kind == "adapter" else plain)
    assert torch.equal(outputs(loaded), outputs(model))
    unload(loaded)
    assert torch.equal(loaded.head.weight, torch.ones(CLASSES + 1, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_derived_class_that_a_command_lines_checkpoint_names_is_built_and_loads_no_weights(tmp_path, kind: str):
    model = SizedAgain()
    nn.init.ones_(model.head.weight)
    nn.init.constant_(model.head.bias, CLASSES)
    file = saved(tmp_path, model, kind, target_modules=["body.0"], modules_to_save=["head"])
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": f"{__name__}.SizedAgain",
    }
    torch.save(content, file)
    for loaded in (load_from_checkpoint(Sized, file, weights_only=False), load_from_checkpoint(SizedAgain, file)):
        assert type(loaded) is SizedAgain
        assert torch.equal(outputs(loaded), outputs(model))
        unload(loaded)
        assert loaded.head.bias.tolist() == [CLASSES] * CLASSES
    with pytest.raises(LoRAError, match=rf"from the class {__name__}\.SizedAgain, and Sized was given"):
        load_from_checkpoint(Sized, file)


def test_a_class_is_as_it_was_after_load_from_checkpoint_and_after_its_failure(tmp_path):
    before = {cls: vars(cls).get("on_load_checkpoint") for cls in (Net, Sized, SizedAgain)}
    file = saved(tmp_path, Net(), "adapter")
    load_from_checkpoint(Net, file)
    assert "on_load_checkpoint" not in vars(Net)
    with pytest.raises(KeyError, match=r"head\.bias"):  # which an adapter that leaves the head out does not hold
        load_from_checkpoint(Sized, file)
    assert {cls: vars(cls).get("on_load_checkpoint") for cls in before} == before


def test_a_type_error_of_the_class_itself_is_raised_as_it_is(tmp_path):
    calls = []

    class Refuses(Net):
        @classmethod
        def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            raise TypeError("no such thing")

    with pytest.raises(TypeError, match="no such thing"):
        load_from_checkpoint(Refuses, saved(tmp_path, Net(), "adapter"))
    assert len(calls) == 1


class NeedsWidth(Net):
    def __init__(self, width: int, lr: float = 0.05) -> None:
        super().__init__(width, 1, lr)


class PassesOnWidth(NeedsWidth):
    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        return super().load_from_checkpoint(*args, **kwargs)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """What a checkpoint of a Net holds."""
    trainer = make_trainer(tmp_path, LoRACallback(r=2))
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found: dict[str, Any] = torch.load(tmp_path / "a.ckpt", weights_only=True)
    return found


@pytest.mark.parametrize("weights_only", [None, False])
@pytest.mark.parametrize("value", [[1, 2], "text", 3, None, torch.ones(2)], ids=lambda value: type(value).__name__)
def test_hyper_parameters_that_are_no_mapping_are_refused(
    tmp_path: Path, content: dict[str, Any], value: Any, weights_only: bool | None
):
    torch.save({**content, "hyper_parameters": value}, tmp_path / "b.ckpt")
    with pytest.raises(LoRAError, match=f"must be a mapping, found {type(value).__name__}; it is damaged"):
        load_from_checkpoint(Net, tmp_path / "b.ckpt", weights_only=weights_only)


@pytest.mark.parametrize("cls", [NeedsWidth, PassesOnWidth])
@pytest.mark.parametrize(
    "entries",
    [
        {"hyper_parameters": {}},
        {"pytorch-lightning_version": "no version"},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_error_of_lightning_names_the_checkpoint_and_the_remedy(
    tmp_path: Path, content: dict[str, Any], cls: Any, entries: dict[str, Any]
):
    torch.save({**content, **entries}, tmp_path / "b.ckpt")
    with pytest.raises(
        LoRAError, match=r"b\.ckpt: .* Pass what is missing or does not fit as keyword arguments"
    ) as told:
        load_from_checkpoint(cls, tmp_path / "b.ckpt")
    assert str(told.value).startswith(f"load_from_checkpoint: {cls.__name__} cannot be built from ")
    assert told.value.__cause__ is not None
    assert not isinstance(told.value.__cause__, LoRAError)


class Raises(Net):
    def __init__(self, width: int = 8, seed: int = 1, lr: float = 0.05) -> None:
        super().__init__(width, seed, lr)
        raise KeyError("of the class")


def test_error_that_the_class_raises_stays_as_it_is(tmp_path: Path, content: dict[str, Any]):
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(KeyError, match="of the class"):
        load_from_checkpoint(Raises, tmp_path / "b.ckpt")


@pytest.mark.parametrize("given", [None, 3, Net(), nn.Linear, dict], ids=repr)
def test_something_else_than_a_class_is_refused(tmp_path: Path, given: Any):
    with pytest.raises(LoRAError, match="load_from_checkpoint: expected the class of a LightningModule, found "):
        load_from_checkpoint(given, tmp_path / "a.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_strict_of_lightnings_own_call_is_taken_if_true_and_refused_if_false(tmp_path: Path, kind: str):
    file = saved(tmp_path, model := Net(), kind)
    for strict in (True, None):  # None is Lightning's default
        assert torch.equal(outputs(load_from_checkpoint(Net, file, strict=strict)), outputs(model))
    with pytest.raises(LoRAError, match=r"^load_from_checkpoint: strict=False .* leave strict out"):
        load_from_checkpoint(Net, file, strict=False)
