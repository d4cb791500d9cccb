"""The options among the logged hyper-parameters: beside the module's own, in one call, and in no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_lora import LoRACallback, LoRAConfig, inject
from lightning_lora.trainer.hyperparameters import as_hyperparameters
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import Data, Net, fit_model, make_trainer

OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["body.0", "head"],
    "rank_pattern": {"head": 4},
    "save": "merged",
    "seed": 3,
}
OWN = {"width": 8, "seed": 1, "lr": 0.05}  # of Net


class Records(Logger):
    """Notes what it is given."""

    name, version = "records", 0

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, Any]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.given.append(dict(params))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


class Bare(Net):
    """Without hyper-parameters for loggers."""

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        super().save_hyperparameters({"width": 8, "seed": 1, "lr": 0.05}, logger=False)


class DataWithHyperparameters(Data):
    def __init__(self, batches: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def of_lora(given: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("lora/"): value for name, value in given.items() if name.startswith("lora/")}


def others(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if not name.startswith("lora/")}


@pytest.mark.parametrize(
    ("model", "data", "own"),
    [(Net, Data, OWN), (Bare, Data, {}), (Bare, DataWithHyperparameters, {"batches": 3})],
    ids=["module", "none", "data"],
)
def test_each_logger_is_given_options_and_own_hyperparameters_in_one_call(tmp_path: Path, model, data, own):
    loggers = [Records(), Records()]
    fit_model(tmp_path, module := model(), LoRACallback(**OPTIONS), data=data(), logger=loggers)
    for logger in loggers:
        (given,) = logger.given
        assert others(given) == own
        assert of_lora(given) == {
            "r": 2,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": "body.0, head",
            "target_parameters": None,
            "trainable_token_indices": None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": None,
            "task_type": None,
            "rank_pattern": '{"head": 4}',
            "alpha_pattern": None,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "variant": "lora",
            "variant_options": None,
            "init_lora_weights": True,
            "enable_lora": None,
            "autocast_adapter_dtype": True,
            "save": "merged",
            "merged_eval": True,
            "quantize": None,
            "seed": 3,
        }
    assert module.hparams == model().hparams


def test_every_option_is_among_them_as_a_plain_value():
    config = LoRAConfig(layers_to_transform=[0, 2], target_modules=["q", "v"], lora_alpha=2.5)
    found = as_hyperparameters(config, seed=np.int64(16))
    assert set(of_lora(found)) == {*LoRAConfig.__dataclass_fields__, "seed"}
    assert {type(value) for value in found.values()} <= {bool, int, float, str, type(None)}
    assert (found["lora/layers_to_transform"], found["lora/lora_alpha"]) == ("0, 2", 2.5)


def test_csv_logger_writes_them_and_checkpoints_hold_the_modules_own_alone(tmp_path: Path):
    logger = CSVLogger(tmp_path, name=None, version="")
    checkpoint = ModelCheckpoint(tmp_path / "saved")
    make_trainer(tmp_path, LoRACallback(**OPTIONS), checkpoint, logger=logger).fit(Net(), Data())
    written = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert others(written) == OWN
    assert of_lora(written)["r"] == 2
    saved = torch.load(checkpoint.best_model_path, **PLAIN_TYPES_ONLY)
    assert saved["hyper_parameters"] == OWN


def test_a_second_fit_logs_its_own_options(tmp_path: Path):
    logger = Records()
    inject(model := Net(), LoRAConfig(r=3, target_modules=["head"]))
    for save in ("adapter", "full"):
        make_trainer(tmp_path, LoRACallback(save=save), logger=logger).fit(model, Data())
    assert [of_lora(given)["save"] for given in logger.given] == ["adapter", "full"]
    assert [of_lora(given)["r"] for given in logger.given] == [3, 3]
    assert model.hparams == OWN
