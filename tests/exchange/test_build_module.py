"""load_from_checkpoint: what a class is built from, and classes that read the file's tensors meanwhile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRACallback, LoRAError, load_adapter, load_from_checkpoint, unload
from support.runs.training import CLASSES, Net, assert_same_tensors, fit_model, outputs


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
    """Unpickles the file, and builds the loss from a buffer in it. So does chemprop 2.3."""

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, strict: Any = True, **kwargs: Any
    ) -> Any:
        state = torch.load(checkpoint_path, map_location, weights_only=False)["state_dict"]
        kwargs["loss"] = Weighted(state["criterion.weights"] + 0)
        checkpoint_path.seek(0)
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, **kwargs)


class PassesOn(WithLoss):
    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        return super().load_from_checkpoint(*args, **kwargs)


class Sized(Net):
    """The head is as wide as the file's."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.head = nn.Linear(8, len(checkpoint["state_dict"]["head.bias"]))


class Child(Net):
    def __init__(self, width: int = 8, **unused: Any) -> None:  # without which Lightning builds no derived class
        super().__init__(width)


class Grandchild(Child):
    pass


def saved(path: Path, model: Net, kind: Any = "adapter") -> Path:
    torch.manual_seed(0)
    fit_model(path, model, LoRACallback(r=2, save=kind), saved=path / "saved.ckpt")
    return path / "saved.ckpt"


def followed(error: LoRAError, cls: type[Net], module: Net) -> Any:
    """The model after the lines in an error, with a module in the place of the call that builds one."""
    lines = re.search(r"build the module yourself: (.*)\.$", str(error))
    assert lines is not None
    names: dict[str, Any] = {"module": module, "torch": torch, "load_adapter": load_adapter}
    exec(lines[1].replace(f"{cls.__name__}(...)", "module"), names)
    return names["model"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Net."""
    return saved(tmp_path_factory.mktemp("net"), Net())


def with_entries(file: Path, path: Path, **entries: Any) -> Path:
    torch.save({**torch.load(file, weights_only=True), **entries}, path / "b.ckpt")
    return path / "b.ckpt"


@pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")
def test_class_with_its_own_load_from_checkpoint_is_loaded_onto_the_base_that_it_builds(tmp_path):
    weights = torch.tensor([1.0, 2.0, 3.0])
    file = saved(tmp_path, model := PassesOn(Weighted(weights)))
    loaded = load_from_checkpoint(PassesOn, file, weights_only=False)
    assert torch.equal(outputs(loaded), outputs(model))
    assert_same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    unload(loaded)
    assert_same_tensors(dict(loaded.state_dict()), dict(PassesOn(Weighted(weights)).state_dict()))
    with pytest.raises(LoRAError, match="objects are not unpickled"):
        load_from_checkpoint(PassesOn, file)


@pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")
@pytest.mark.parametrize(
    ("make", "kind"),
    [(Sized, "merged"), (lambda: ReadsItsFile(Weighted(torch.ones(CLASSES))), "full")],
    ids=["on_load", "own"],
)
def test_class_that_reads_the_files_tensors_is_refused_with_the_call_that_loads_it(tmp_path, make: Any, kind: str):
    file = saved(tmp_path, model := make(), kind)
    cls = type(model)
    own = Sized.on_load_checkpoint
    with pytest.raises(LoRAError, match=f"{cls.__name__} cannot be built from") as told:
        load_from_checkpoint(cls, file, weights_only=False)
    assert Sized.on_load_checkpoint is own
    assert torch.equal(outputs(followed(told.value, cls, make())), outputs(model))


def test_derived_class_that_a_command_lines_checkpoint_names_is_built_where_the_file_is_trusted(tmp_path):
    file = saved(tmp_path, Grandchild(), "adapter")
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": f"{__name__}.Grandchild",
    }
    torch.save(content, file)
    for loaded in (load_from_checkpoint(Child, file, weights_only=False), load_from_checkpoint(Grandchild, file)):
        assert type(loaded) is Grandchild
    with pytest.raises(LoRAError, match=rf"from the class {__name__}\.Grandchild, and Child was given"):
        load_from_checkpoint(Child, file)


def test_strict_of_lightnings_own_call_is_taken_if_true_and_refused_if_false(file: Path):
    for strict in (True, None):  # None is Lightning's default
        load_from_checkpoint(Net, file, strict=strict)
    assert "on_load_checkpoint" not in vars(Net)
    with pytest.raises(LoRAError, match=r"^load_from_checkpoint: strict=False"):
        load_from_checkpoint(Net, file, strict=False)


class NeedsWidth(Net):
    def __init__(self, width: int, lr: float = 0.05) -> None:
        super().__init__(width, 1, lr)


@pytest.mark.parametrize("value", [[1, 2], "text", None], ids=str)
def test_hyper_parameters_that_are_no_mapping_are_refused(tmp_path: Path, file: Path, value: Any):
    path = with_entries(file, tmp_path, hyper_parameters=value)
    for weights_only in (None, False):
        with pytest.raises(LoRAError, match=f"must be a mapping, found {type(value).__name__}"):
            load_from_checkpoint(Net, path, weights_only=weights_only)


@pytest.mark.parametrize("entries", [{"hyper_parameters": {}}, {"pytorch-lightning_version": "no version"}], ids=str)
def test_error_of_lightning_names_the_checkpoint_and_the_remedy(tmp_path: Path, file: Path, entries: dict[str, Any]):
    with pytest.raises(LoRAError, match=r"NeedsWidth cannot be built from .*b\.ckpt: .* keyword arguments") as told:
        load_from_checkpoint(NeedsWidth, with_entries(file, tmp_path, **entries))
    assert not isinstance(told.value.__cause__, LoRAError | None)


@pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")
def test_the_advice_for_a_full_checkpoint_with_objects_is_what_reads_none(tmp_path: Path):
    file = saved(tmp_path, model := WithLoss(loss := Weighted(torch.ones(CLASSES))), "full")
    with pytest.raises(LoRAError, match=r"weights_only=False; otherwise .*\(loss=...\)\.$"):
        load_from_checkpoint(WithLoss, file)
    assert torch.equal(outputs(load_from_checkpoint(WithLoss, file, loss=loss)), outputs(model))


class NeedsSeed(Net):
    def __init__(self, seed: int, lr: float = 0.05) -> None:
        super().__init__(8, seed, lr)


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_the_advice_where_a_class_cannot_be_built_loads_a_checkpoint_of_each_kind(tmp_path: Path, kind: str):
    """A full one brings its base, which load_adapter alone refuses as another than the new module's."""
    path = with_entries(saved(tmp_path, model := Net(), kind), tmp_path, hyper_parameters={})
    with pytest.raises(LoRAError, match="NeedsSeed cannot be built from") as told:
        load_from_checkpoint(NeedsSeed, path)
    loaded = followed(told.value, NeedsSeed, NeedsSeed(9 if kind == "full" else 1))
    assert torch.equal(outputs(loaded), outputs(model))


class Raises(Net):
    def __init__(self, width: int = 8, seed: int = 1, lr: float = 0.05) -> None:
        super().__init__(width, seed, lr)
        raise KeyError("of the class")


def test_error_that_the_class_raises_stays_as_it_is(file: Path):
    with pytest.raises(KeyError, match="of the class"):
        load_from_checkpoint(Raises, file)


def test_something_else_than_a_class_is_refused(file: Path):
    for given in (None, 3, Net(), nn.Linear, dict):
        with pytest.raises(LoRAError, match="expected the class of a LightningModule"):
            load_from_checkpoint(given, file)  # type: ignore[arg-type, type-var]
