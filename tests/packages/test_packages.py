"""Published packages take the callback: each model is trained, evaluated, saved, resumed and loaded as its own
LightningModule, in small and without the network.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, disable_adapter, is_merged, load_adapter, load_from_checkpoint
from lightning_lora.nn.adapted_module import adapted_layers
from support.runs.training import assert_same_tensors, own_random_stream, weights

EPOCHS = 2
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
}
NOTICES = (  # what the packages say of themselves, with and without this one
    "ignore:Attribute '\\w+' is an instance of `nn.Module` and is already saved",
    "ignore:enable_nested_tensor is True, but self.use_nested_tensor is False",
    "ignore:'pin_memory' argument is set as true but no accelerator is found",
)

pytestmark = [pytest.mark.packages, *(pytest.mark.filterwarnings(notice) for notice in NOTICES)]


@dataclass(frozen=True)
class Case:
    """A package's model. `make` gives it with the same base weights each time, `data` the batches that it is trained
    and evaluated on, in a fixed order, and `lightning` is the name by which it imports Lightning.
    """

    make: Callable[[], Any]
    data: Callable[[], DataLoader[Any]]
    lightning: str = "lightning.pytorch"

    def fit(self, model: Any, path: Path, callback: LoRACallback, **options: Any) -> Any:
        """Fit under a new Trainer, which writes "epoch=0.ckpt" and so on; return the Trainer."""
        trainer = self.new_trainer(path, callback)
        trainer.fit(model, self.data(), self.data(), **options)
        return trainer

    def numbers(self, model: Any, path: Path, *callbacks: LoRACallback, **options: Any) -> dict[str, float]:
        """Return all that a validation logs."""
        trainer = self.new_trainer(path, *callbacks)
        (numbers,) = trainer.validate(model, self.data(), verbose=False, **options)
        return dict(numbers)

    def new_trainer(self, path: Path, *callbacks: LoRACallback) -> Any:
        saver = self.part("callbacks.ModelCheckpoint")(path, filename="{epoch}", save_top_k=-1)
        options = QUIET | {"enable_checkpointing": True, "default_root_dir": path, "log_every_n_steps": 1}
        return self.part("Trainer")(max_epochs=EPOCHS, callbacks=[*callbacks, saver], **options)

    def part(self, name: str) -> Any:
        """Return a class of the Lightning that the package uses."""
        module, _, leaf = f"{self.lightning}.{name}".rpartition(".")
        return getattr(import_module(module), leaf)


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(r=2, lora_alpha=4, seed=0, **options)


# --- the packages' models, small; a package is imported where its model is made ---


class Classifier(L.LightningModule):
    """A vision package's network in a LightningModule, as users write it."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        with own_random_stream(0):
            self.network = NETWORKS[network]()

    def training_step(self, batch: Any) -> Any:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def torchvision_swin() -> nn.Module:
    swin = import_module("torchvision.models.swin_transformer")
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.0)


def torchvision_swin_v2() -> nn.Module:
    swin = import_module("torchvision.models.swin_transformer")
    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.0, **parts)


def torchvision_vit() -> nn.Module:
    return import_module("torchvision.models").VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)


def timm_vit() -> nn.Module:
    """With as many classes as timm's weights have, so that the head is not new."""
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return import_module("timm").create_model("vit_tiny_patch16_224", pretrained=False, **small)


NETWORKS = {
    function.__name__: function for function in (torchvision_swin, torchvision_swin_v2, torchvision_vit, timm_vit)
}


def images() -> DataLoader[Any]:
    with own_random_stream(1):
        return DataLoader(TensorDataset(torch.randn(12, 3, 16, 16), torch.randint(3, (12,))), batch_size=4)


def series(**options: Any) -> Any:
    """A small data set of pytorch-forecasting: two groups, one value."""
    pandas = import_module("pandas")
    times = torch.arange(40)
    columns = {"time": times.repeat(2), "week": times.repeat(2) % 7.0, "value": torch.sin(torch.arange(80) / 3) + 2}
    frame = pandas.DataFrame({name: column.numpy() for name, column in columns.items()})
    frame["group"] = ["a"] * 40 + ["b"] * 40
    return import_module("pytorch_forecasting").TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        **options,
    )


def covariates() -> Any:
    normalizer = import_module("pytorch_forecasting.data").GroupNormalizer(groups=["group"])
    return series(time_varying_known_reals=["week"], static_categoricals=["group"], target_normalizer=normalizer)


def in_order(dataset: Any) -> DataLoader[Any]:
    loader: DataLoader[Any] = dataset.to_dataloader(train=False, batch_size=32, num_workers=0)
    return loader


def nbeats() -> Any:
    cls = import_module("pytorch_forecasting").NBeats
    with own_random_stream(0):
        return cls.from_dataset(series(), widths=[8, 16], num_blocks=[1, 1], learning_rate=0.01, dropout=0.0)


def temporal_fusion_transformer() -> Any:
    cls = import_module("pytorch_forecasting").TemporalFusionTransformer
    small = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "dropout": 0.0}
    with own_random_stream(0):
        return cls.from_dataset(covariates(), learning_rate=0.01, embedding_sizes={"group": (2, 8)}, **small)


def darts_series() -> Any:
    return import_module("darts").TimeSeries.from_values((torch.sin(torch.arange(60) / 3) + 2).numpy())


def darts_transformer(*callbacks: LoRACallback) -> Any:
    """A model of darts, which builds its LightningModule when it is fitted."""
    return import_module("darts.models").TransformerModel(
        input_chunk_length=12,
        output_chunk_length=4,
        d_model=8,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=16,
        dropout=0.0,
        n_epochs=1,
        random_state=0,
        pl_trainer_kwargs=QUIET | {"callbacks": list(callbacks)},
    )


def pretrained_darts_transformer() -> Any:
    return darts_transformer().fit(darts_series(), val_series=darts_series())


def darts_batches() -> DataLoader[Any]:
    loader = pretrained_darts_transformer().trainer.datamodule.val_dataloader()
    return DataLoader(loader.dataset, batch_size=16, collate_fn=loader.collate_fn)


CASES = {
    "torchvision Swin": Case(lambda: Classifier("torchvision_swin"), images),
    "torchvision Swin V2": Case(lambda: Classifier("torchvision_swin_v2"), images),
    "torchvision ViT": Case(lambda: Classifier("torchvision_vit"), images),
    "timm ViT": Case(lambda: Classifier("timm_vit"), images),
    "pytorch-forecasting N-BEATS": Case(nbeats, lambda: in_order(series())),
    "pytorch-forecasting TFT": Case(temporal_fusion_transformer, lambda: in_order(covariates())),
    "darts Transformer": Case(
        lambda: pretrained_darts_transformer().model, darts_batches, lightning="pytorch_lightning"
    ),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked for: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_fit_trains_or_names_every_adapter_and_keeps_the_base(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = case.make()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.fit(model, tmp_path, lora())
    said = "\n".join([caplog.text, *(str(warning.message) for warning in caught)])
    layers = adapted_layers(model)
    assert layers
    untrained = [name for name, layer in layers.items() if not layer.lora_B.detach().any()]
    assert len(untrained) < len(layers) / 2
    assert [name for name in untrained if f"'{name}'" not in said] == []
    assert not is_merged(model)
    assert_same_tensors({name: p for name, p in model.named_parameters() if name in before}, before)


def test_merged_evaluation_gives_the_numbers_of_the_unmerged_one(case: Case, tmp_path: Path):
    effect = {"init_lora_weights": False}  # of every adapter, also one that training does not reach
    case.fit(model := case.make(), tmp_path, lora(**effect))
    unmerged = case.numbers(model, tmp_path, lora(merged_eval=False, **effect))
    assert case.numbers(model, tmp_path, lora(**effect)) == pytest.approx(unmerged, rel=1e-4, abs=1e-5)
    with disable_adapter(model):
        assert case.numbers(model, tmp_path) != pytest.approx(unmerged, rel=1e-3)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_checkpoint_resumes_evaluates_and_loads_as_if_never_interrupted(case: Case, kind: Any, tmp_path: Path):
    case.fit(whole := case.make(), tmp_path, lora(save=kind))
    middle, last = (tmp_path / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS))
    case.fit(resumed := case.make(), tmp_path, lora(save=kind), ckpt_path=middle, weights_only=False)
    assert_same_tensors(weights(resumed), weights(whole))

    read = case.numbers(case.make(), tmp_path, lora(save=kind), ckpt_path=last, weights_only=False)
    assert read == pytest.approx(case.numbers(whole, tmp_path, lora(save=kind)), rel=1e-5)

    load_adapter(loaded := case.make(), last)
    assert_same_tensors(weights(loaded), weights(whole))


def test_checkpoint_with_the_base_builds_the_module_from_its_hyperparameters(case: Case, tmp_path: Path):
    case.fit(tuned := case.make(), tmp_path, lora(save="full")).save_checkpoint(full := tmp_path / "full.ckpt")
    loaded = load_from_checkpoint(type(tuned), full, weights_only=False)
    assert_same_tensors(weights(loaded), weights(tuned))

    case.fit(tuned := case.make(), tmp_path, lora(save="merged")).save_checkpoint(plain := tmp_path / "merged.ckpt")
    without = type(tuned).load_from_checkpoint(plain, weights_only=False)  # as a program without this package does
    assert case.numbers(without, tmp_path) == pytest.approx(case.numbers(tuned, tmp_path), rel=1e-4, abs=1e-5)


def test_darts_tunes_predicts_saves_and_loads_by_its_own_methods(tmp_path: Path):
    base, model = pretrained_darts_transformer(), darts_transformer(lora(save="merged"))
    base.save(str(tmp_path / "base.pt"))
    model.load_weights(str(tmp_path / "base.pt"))
    model.fit(darts_series(), val_series=darts_series())
    tuned = model.predict(8).values()
    assert abs(tuned - base.predict(8).values()).max() > 1e-3
    model.save(str(tmp_path / "tuned.pt"), clean=True)
    loaded = import_module("darts.models").TransformerModel.load(str(tmp_path / "tuned.pt"), pl_trainer_kwargs=QUIET)
    assert loaded.predict(8, series=darts_series()).values() == pytest.approx(tuned, rel=1e-4)
