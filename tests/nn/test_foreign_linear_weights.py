"""Which tensors of foreign linear layers are the base's: in no adapter file, and in the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    attach,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    summary,
    take_adapter,
)
from lightning_lora.nn.foreign_linear import is_foreign_linear, is_of_base
from support.covering import covering
from support.models.foreign import FOREIGN, INPUTS, QuantLinear, TELinear, inputs, network
from support.runs.lightning_versions import EMAWeightAveraging
from support.runs.training import make_trainer

TARGETS = ["0", "2"]


class Centred(nn.Module):
    """A user's layer with such sizes, a weight that is a parameter, and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = INPUTS, INPUTS
        self.weight = nn.Parameter(torch.eye(INPUTS))
        self.register_buffer("mean", torch.zeros(INPUTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)  # type: ignore[operator]
        return F.linear(x - self.mean, self.weight)


def sized(module: Any, inputs: Any, outputs: Any) -> nn.Module:
    module.in_features, module.out_features = inputs, outputs
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (TELinear(4, 8), True),
        (QuantLinear(nn.Linear(8, 8)), True),
        (nn.Linear(2, 2), False),
        (nn.Embedding(2, 2), False),
        (sized(nn.Module(), 2, None), False),
        (sized(nn.Module(), True, 2), False),
        (sized(nn.Module(), 2, 2.0), False),
        (sized(nn.Module(), 0, 2), False),
    ],
)
def test_a_foreign_linear_layer_is_told_by_its_two_sizes(module: nn.Module, expected: bool) -> None:
    assert is_foreign_linear(module) is expected


def test_buffers_are_the_bases_where_no_parameter_can_be_the_weight_or_the_layer_is_adapted() -> None:
    assert is_of_base(QuantLinear(nn.Linear(8, 8)))
    assert not is_of_base(Centred())
    assert not is_of_base(nn.BatchNorm1d(4))
    assert not is_of_base(sized(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2, 2))
    assert not is_of_base(sized(nn.Module(), 2, 2))  # nothing shows its weight
    inject(model := nn.Sequential(Centred()), LoRAConfig(target_modules=["0"]))
    assert is_of_base(model[0])


class Net(L.LightningModule):
    def __init__(self, kind: str = "GPTQ", seed: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network(kind, seed)
        self.norm = nn.BatchNorm1d(INPUTS)

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def data() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(4)
    x, y = torch.randn(12, INPUTS, generator=draw), torch.randint(3, (12,), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "target_modules": TARGETS} | options)


def fitted(path: Path, *callbacks: Any, model: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = model or Net()
    trainer = make_trainer(path, *(callbacks or (lora(),)), **{"max_epochs": 1} | options)
    trainer.fit(model, data(), data(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path / "last.ckpt")
    return model


def same(model: Any, other: Any) -> bool:
    states = (m.state_dict() for m in (model, other))
    one, two = ({name: v for name, v in state.items() if isinstance(v, torch.Tensor)} for state in states)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


BUFFERS_OF_NORM = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
EXTRA = {"net.0._extra_state", "net.2._extra_state"}


@pytest.mark.parametrize(("kind", "targets"), covering([*FOREIGN], [["0", "2"], ["2"], ["4"]], meet=1))
def test_an_adapter_checkpoint_holds_no_tensor_of_the_base(tmp_path: Path, kind: str, targets: Any) -> None:
    """Neither of adapted foreign layers nor of others."""
    model = fitted(tmp_path, lora(target_modules=targets), model=Net(kind))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    factors = {f"net.{name}.lora_{leaf}" for name in targets for leaf in "AB"}
    assert checkpoint["state_dict"].keys() == factors | BUFFERS_OF_NORM | (EXTRA if kind == "TE" else set())
    shown = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    base = {name for name in shown if name not in checkpoint["state_dict"]}
    assert checkpoint["lora"]["fingerprint"].keys() == base
    assert not summary(model).also_saved.keys() - BUFFERS_OF_NORM
    assert take_adapter(model).tensors.keys() == adapter_state_dict(model).keys() == checkpoint["state_dict"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "save"), covering([*FOREIGN], ["adapter", "full"], meet=1))
def test_a_run_resumes_bit_for_bit_and_its_file_is_loaded(tmp_path: Path, kind: str, save: Any) -> None:
    whole = fitted(tmp_path / "whole", lora(save=save), model=Net(kind), max_epochs=2)
    half = fitted(tmp_path / "half", lora(save=save), model=Net(kind))
    path = tmp_path / "half/last.ckpt"
    resumed = fitted(tmp_path / "on", lora(save=save), model=Net(kind), max_epochs=2, ckpt_path=path)
    assert same(resumed, whole)
    assert not same(half, whole)
    x = inputs()
    for loaded in (load_from_checkpoint(Net, path), Net(kind)):
        load_adapter(loaded, path)
        assert torch.equal(loaded.eval()(x), half.eval()(x))
    make_trainer(tmp_path, LoRACallback()).test(fresh := Net(kind), data(), ckpt_path=path, verbose=False)
    assert torch.equal(fresh.eval()(x), half(x))


def test_merged_checkpoints_of_such_a_model_are_refused_at_fit_start(tmp_path: Path) -> None:
    for options in ({"save": "merged"}, {"save": "merged", "dequantize": "float32"}, {"merge_after_fit": True}):
        with pytest.raises(LoRAError, match=r"'net\.0': it is a QuantLinear"):
            fitted(tmp_path, lora(**options))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "targets"), covering([*FOREIGN], [["0", "2"], ["4"]], meet=1))
def test_another_quantized_base_is_refused(tmp_path: Path, kind: str, targets: Any) -> None:
    def built(seed: int = 1) -> Any:
        model = Net(kind)
        other = network(kind, seed)
        model.net[0], model.net[2] = other[0], other[2]  # the layers that are quantized alone
        return model

    model = fitted(tmp_path, lora(target_modules=targets), model=built())
    save_adapter(model, tmp_path / "folder")
    taken, path = take_adapter(model), tmp_path / "last.ckpt"
    for source in (tmp_path / "folder", taken, path):
        assert load_adapter(built(), source)
        with pytest.raises(LoRAError, match=r"another base: values of 'net\.0\."):
            load_adapter(built(2), source)
        with pytest.warns(UserWarning, match="another base"):
            load_adapter(built(2), source, strict_base=False)
        same, other = built(), built(2)
        for each in (same, other):
            each.norm.load_state_dict(model.norm.state_dict())  # other statistics are refused before
        assert attach(same, source, name="beside")
        with pytest.raises(LoRAError, match=r"another base: values of 'net\.0\."):
            attach(other, source, name="beside")
    with pytest.raises(LoRAError, match="another base"):
        fitted(tmp_path / "on", lora(target_modules=targets), model=built(2), max_epochs=2, ckpt_path=path)


@pytest.mark.parametrize("kind", ["HQQ", "TE"])
def test_a_folder_is_that_of_linear_layers(tmp_path: Path, kind: str) -> None:
    """But for the names of the classes, it is the one of a model with nn.Linear."""
    folders = []
    for name, model in (("foreign", network(kind)), ("torch", nn.Sequential(*map(as_torch, network(kind))))):
        inject(model, LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=False), seed=3)
        save_adapter(model, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        folders.append((config, load_file(tmp_path / name / "adapter_model.safetensors")))
    (config, tensors), (plain_config, plain_tensors) = folders
    assert config == plain_config
    assert tensors.keys() == plain_tensors.keys()
    assert all(torch.equal(value, plain_tensors[key]) for key, value in tensors.items())
    with pytest.warns(UserWarning, match="another base"):
        load_adapter(again := network(kind), tmp_path / "torch", strict_base=False)
    assert torch.equal(again[0].lora_A, model[0].lora_A)


def as_torch(layer: Any) -> nn.Module:
    if not is_foreign_linear(layer):
        return layer  # type: ignore[no-any-return]
    return nn.Linear(layer.in_features, layer.out_features)


def test_buffers_that_training_changes_are_saved_where_the_layer_is_not_adapted(tmp_path: Path) -> None:
    class Around(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Centred()  # type: ignore[assignment]

    fitted(tmp_path, model=Around())
    assert "norm.mean" in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    with pytest.warns(UserWarning, match=r"'norm\.mean' is frozen and has changed"):
        fitted(tmp_path, lora(target_modules=["norm", *TARGETS]), model=Around())


def test_averaging_is_refused_because_it_would_change_packed_bytes(tmp_path: Path) -> None:
    callbacks = lora(), EMAWeightAveraging(decay=0.9)
    with pytest.raises(LoRAError, match=r"'net\.0'.*EMAWeightAveraging averages"):
        fitted(tmp_path, *callbacks, model=Net())
    fitted(tmp_path, lora(), EMAWeightAveraging(decay=0.9), model=Net("TE"))


def test_an_adapter_of_other_such_layers_is_swapped_in(tmp_path: Path) -> None:
    x, sources = inputs(), []
    for position, targets in enumerate((["0", "2"], ["2", "4"], ["4"])):
        inject(model := network(), LoRAConfig(r=2 + position, target_modules=targets, init_lora_weights=False))
        save_adapter(model, tmp_path / str(position))
        sources.append((tmp_path / str(position), model(x)))
    load_adapter(model := network(), sources[0][0])
    for path, wanted in (*sources, *reversed(sources)):
        load_adapter(model, path)
        assert torch.equal(model(x), wanted)


def test_extra_state_that_is_none_or_bytes_is_carried(tmp_path: Path) -> None:
    inject(model := network("TE").eval(), LoRAConfig(target_modules=TARGETS))
    assert adapter_state_dict(model)["0._extra_state"] is None
    load_adapter(model, take_adapter(model))
    save_adapter(model, tmp_path / "none")
    load_adapter(again := network("TE"), tmp_path / "none")
    model.train()(inputs())
    load_adapter(again, take_adapter(model))
    assert torch.equal(again[0].history, model[0].history)


def test_packed_weights_cannot_be_trained_whole() -> None:
    config = LoRAConfig(target_modules=["1"], modules_to_save=["0"])
    packed, plain = (nn.Sequential(network(kind), nn.Linear(3, 3)) for kind in ("HQQ", "TE"))
    inject(plain, config)
    assert plain[0][0].weight.requires_grad
    with pytest.raises(LoRAError, match=r"'0' is to be fully trained, but '0\.0' in it is a HQQLinear"):
        inject(packed, config)
    assert "1.lora_A" not in packed.state_dict()


def test_the_callback_lists_such_layers_to_copy(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="lightning_lora"):
        fitted(tmp_path, LoRACallback(r=2))
    lines = [record.getMessage() for record in caplog.records if "target_modules=['0', '2']" in record.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
