"""Checkpoints whose hyper-parameters hold objects: read without unpickling, and unpickled where the user says so."""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAError,
    export_adapter,
    load_adapter,
    load_from_checkpoint,
    merged_state_dict,
    save_adapter,
)
from lightning_lora.command.info import info
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.files.torch_archive import read_torch_file
from support.files.expected_weights import merge_and_check
from support.models.networks import bits
from support.runs.lightning_versions import ANY_OBJECTS
from support.runs.training import (
    CLASSES,
    FEATURES,
    Data,
    Net,
    assert_same_tensors,
    fit_model,
    make_trainer,
    outputs,
    own_random_stream,
)

SGD = functools.partial(torch.optim.SGD, lr=0.1)
unpickled: list[str] = []

# Lightning advises against a loss among the hyper-parameters, which is how published packages are built.
pytestmark = pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")


class WeightedLoss(nn.Module):
    """A user's loss with a tensor, a function and a list of its own."""

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((CLASSES,), weight))
        self.reduce, self.history = torch.mean, [self.weight]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.reduce(F.cross_entropy(x, y, weight=self.weight, reduction="none"))

    def __deepcopy__(self, memo: Any) -> WeightedLoss:  # by which Lightning keeps the initial hyper-parameters
        return WeightedLoss(self.weight[0].item())

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickled.append("WeightedLoss")
        super().__setstate__(state)


class Shade(Enum):
    """A choice among options."""

    DARK = "dark"


class Choices(Mapping[str, Any]):
    """A configuration that refuses to be read before it is complete, as omegaconf's with a missing value."""

    def __getitem__(self, name: str) -> Any:
        raise ValueError(f"{name} is missing")

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


class WithObjects(L.LightningModule):
    """Objects of many forms in its hyper-parameters; the weights depend on nothing else than the width."""

    def __init__(
        self,
        loss: nn.Module,
        shade: Shade = Shade.DARK,
        optimizer: Callable[..., Any] = SGD,
        names: frozenset[str] = frozenset("ab"),
        choices: Any = None,
        width: int = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        with own_random_stream(1):
            self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.hparams["loss"](self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return self.hparams["optimizer"](self.parameters())


def saved(path: Path, kind: str | None) -> tuple[WithObjects, Path]:
    """A model after an epoch and its checkpoint; without a kind, of plain Lightning."""
    model = WithObjects(WeightedLoss(), choices=Choices(), width=7)
    torch.manual_seed(0)
    fit_model(path, model, *([LoRACallback(r=2, save=kind)] if kind else []), saved=path / "saved.ckpt")
    unpickled.clear()
    return model, path / "saved.ckpt"


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_checkpoint_with_objects_is_read_without_them_and_by_each_remedy_as_a_module(tmp_path, kind: str):
    model, file = saved(tmp_path, kind)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert load_adapter(loaded := WithObjects(WeightedLoss(), width=7), file) == ["body.0", "body.2"]
    assert torch.equal(outputs(loaded), outputs(model))
    assert info(file)["kind"] == f"Lightning checkpoint of kind {kind!r}"
    export_adapter(file, tmp_path / "folder")
    load_adapter(again := WithObjects(WeightedLoss(), width=7), tmp_path / "folder")
    assert torch.equal(outputs(again), outputs(model))

    with pytest.raises(LoRAError) as refused:
        load_from_checkpoint(WithObjects, file)
    message = str(refused.value)
    assert f"checkpoint['hyper_parameters']['loss'] is of {__name__}.WeightedLoss" in message
    assert "weights_only=False" in message
    assert "(loss=..., shade=..., optimizer=..., names=..., choices=...)" in message
    assert f'model = WithObjects(...); load_adapter(model, "{file}")' in message
    objects = {"shade": None, "optimizer": None, "names": None, "choices": None}
    given = load_from_checkpoint(WithObjects, file, loss=WeightedLoss(3.0), **objects)
    assert given.hparams["loss"].weight.tolist() == [3.0] * CLASSES
    assert not unpickled
    trusted = load_from_checkpoint(WithObjects, file, weights_only=False)
    assert unpickled
    assert trusted.hparams["loss"].weight.tolist() == [2.0] * CLASSES
    for loaded in (trusted, given):
        assert loaded.hparams["width"] == 7
        assert torch.equal(outputs(loaded), outputs(model))
    if kind == "merged":
        plain = WithObjects.load_from_checkpoint(file, **ANY_OBJECTS)
        assert_same_tensors(read_torch_file(file)["state_dict"], dict(plain.state_dict()))


def test_trainer_resumes_from_a_checkpoint_with_objects(tmp_path):
    model, file = saved(tmp_path, "adapter")
    resumed = WithObjects(WeightedLoss(), choices=Choices(), width=7)
    trainer = make_trainer(tmp_path, LoRACallback(r=2))
    trainer.validate(resumed, Data(), ckpt_path=file, verbose=False, **ANY_OBJECTS)
    assert torch.equal(outputs(resumed), outputs(model))
    trainer = make_trainer(tmp_path, LoRACallback(r=2), max_epochs=2)
    trainer.fit(resumed, Data(), ckpt_path=file, **ANY_OBJECTS)
    assert trainer.current_epoch == 2


def test_an_object_in_the_state_of_a_scheduler_or_callback_is_passed_over_when_a_module_is_built(tmp_path):
    """Weight averaging's scheduler has one in torch 2.6."""
    model = Net()
    fit_model(tmp_path, model, LoRACallback(r=2), saved=tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["lr_schedulers"][0]["anneal"] = content["callbacks"]["Mine"] = WeightedLoss()
    torch.save(content, tmp_path / "a.ckpt")
    unpickled.clear()
    loaded = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    assert_same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not unpickled


def test_merge_into_a_base_checkpoint_with_objects_is_refused_and_its_state_dict_is_a_base(tmp_path):
    (tmp_path / "base").mkdir()
    base, file = saved(tmp_path / "base", None)
    model, adapter = WithObjects(WeightedLoss(), width=7), tmp_path / "adapter"
    model.load_state_dict(base.state_dict())
    make_trainer(tmp_path, LoRACallback(r=2)).fit(model, Data())
    save_adapter(model, adapter)
    with pytest.raises(LoRAError, match=r"'loss'\] is of .*WeightedLoss.*Give the state dict by itself"):
        merge_on_disk(file, adapter, tmp_path / "out.ckpt")
    assert not unpickled
    assert not (tmp_path / "out.ckpt").exists()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    merge_and_check(tmp_path / "base.pt", adapter, tmp_path / "out.pt")
    assert_same_tensors(torch.load(tmp_path / "out.pt", weights_only=True), merged_state_dict(model))


@pytest.mark.parametrize("key", ["state_dict", "lora"])
def test_an_object_among_tensors_or_metadata_is_refused_by_name(tmp_path, key: str):
    content = {"state_dict": {"a.lora_A": torch.zeros(2, 2)}, "lora": {"kind": "adapter"}}
    content[key]["x"] = {"y": [WeightedLoss()]}  # type: ignore[index]
    torch.save(content, tmp_path / "a.ckpt")
    unpickled.clear()
    with pytest.raises(LoRAError, match=rf"\['{key}'\]\['x'\]\['y'\]\[0\] is of .*WeightedLoss"):
        read_torch_file(tmp_path / "a.ckpt", plain=["lora"])
    torch.save(WeightedLoss(), tmp_path / "whole.pt")
    with pytest.raises(LoRAError, match=r"it is of .*WeightedLoss"):
        read_torch_file(tmp_path / "whole.pt")
    assert not unpickled


def test_tensors_beside_objects_are_read_bit_for_bit(tmp_path):
    tensors = {
        "float": torch.randn(3, 4).t(),
        "half": torch.randn(3).half(),
        "byte float": torch.randn(3).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(3).to(torch.uint16),
        "parameter": nn.Parameter(torch.randn(2)),
        "empty": torch.zeros(0, 3),
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save({"state_dict": tensors, "object": WeightedLoss()}, tmp_path / "a.ckpt")
    found = read_torch_file(tmp_path / "a.ckpt")["state_dict"]
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        dense, wanted = found[name].to_dense(), tensor.to_dense()
        assert (dense.dtype, dense.shape, type(found[name])) == (wanted.dtype, wanted.shape, type(tensor))
        assert bits(dense) == bits(wanted)
    del tensors["sparse"]  # which torch 2.6 does not read onto that device
    torch.save({"state_dict": tensors, "object": WeightedLoss()}, tmp_path / "a.ckpt")
    on_meta = read_torch_file(tmp_path / "a.ckpt", "meta")["state_dict"]
    assert all(tensor.is_meta for tensor in on_meta.values())


# --- pickles that are made to hurt ---


def with_pickle(path: Path, pickled: bytes) -> Path:
    """An archive of torch.save with another pickle in it."""
    torch.save({}, path / "good.ckpt")
    with zipfile.ZipFile(path / "good.ckpt") as good, zipfile.ZipFile(path / "bad.ckpt", "w") as bad:
        for info in good.infolist():
            bad.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else good.read(info))
    return path / "bad.ckpt"


class Calls:
    """Unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def note(text: str) -> list[str]:
    unpickled.append(text)
    return unpickled


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "harm",
    [
        Calls(note, "called"),
        Calls(eval, f"__import__('{__name__}').note('evaluated')"),
        Calls(exec, "import os; os.mkdir('harmed')"),
        Calls(torch.load, "other.ckpt"),
        functools.partial(note, "partial"),
    ],
)
def test_no_function_in_a_checkpoint_is_called_whatever_it_is(tmp_path, monkeypatch, harm: Any, protocol: int):
    monkeypatch.chdir(tmp_path)
    unpickled.clear()
    content = {"state_dict": {}, "hyper_parameters": {"x": harm, "again": [harm]}}
    found = read_torch_file(with_pickle(tmp_path, pickle.dumps(content, protocol)))
    assert found["state_dict"] == {}
    assert not unpickled
    assert not (tmp_path / "harmed").exists()


def test_pickle_that_rewrites_a_function_of_torch_is_refused_and_does_not(tmp_path):
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__, dict(vars(function))
    state = pickle.dumps((None, {"__defaults__": (1, 2, 3)}), 2)[2:-1]  # what BUILD sets by setattr
    pickled = b"\x80\x02}X\x01\x00\x00\x00xc" + b"torch._utils\n_rebuild_tensor_v2\n" + state + b"bs."
    with pytest.raises(LoRAError, match="a function has no state"):
        read_torch_file(with_pickle(tmp_path, pickled))
    assert (function.__defaults__, vars(function)) == before


def test_archive_whose_storages_are_of_another_module_is_refused(tmp_path):
    """With an object beside them, so that it is not refused for that alone; and without."""
    for beside in ({}, {"object": WeightedLoss()}):
        torch.save({"state_dict": {"a": torch.ones(3)}, **beside}, tmp_path / "a.ckpt")
        with zipfile.ZipFile(tmp_path / "a.ckpt") as good, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as bad:
            for info in good.infolist():
                bad.writestr(info.filename, good.read(info).replace(b"ctorch\nFloatStorage", b"ctnrch\nFloatStorage"))
        assert torch.equal(read_torch_file(tmp_path / "a.ckpt")["state_dict"]["a"], torch.ones(3))
        with pytest.raises(LoRAError, match=r"b\.ckpt"):
            read_torch_file(tmp_path / "b.ckpt")


def test_pickle_that_torch_refuses_for_another_reason_than_an_object_is_refused(tmp_path):
    content = pickle.dumps({"state_dict": {}, "epoch": 1}, 4)  # of a protocol with operations that torch does not take
    with pytest.raises(LoRAError, match="or is damaged, and was not loaded"):
        read_torch_file(with_pickle(tmp_path, content))


def test_nested_lists_that_hold_themselves_or_each_other_are_read_at_once(tmp_path):
    cycle: list[Any] = []
    cycle.append(cycle)
    wide: list[Any] = []
    for _ in range(100):
        wide = [wide, wide]
    content = {"state_dict": {}, "hyper_parameters": {"cycle": cycle, "wide": wide, "x": WeightedLoss()}}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(LoRAError, match='checkpoint\\["lora"\\]: is missing'):
        load_from_checkpoint(WithObjects, tmp_path / "a.ckpt")
    assert read_torch_file(tmp_path / "a.ckpt")["hyper_parameters"]["cycle"]
