"""A LoRACallback without options takes those of the checkpoint at ckpt_path."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRACLI,
    LoRAConfig,
    LoRAError,
    disable_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    unload,
)
from support.covering import covering
from support.runs.lightning_versions import ANY_OBJECTS, PLAIN_TYPES_ONLY
from support.runs.notices import UNTRAINED_NOTICE
from support.runs.training import (
    FEATURES,
    BuiltInConfigureModel,
    BuiltInSetup,
    Data,
    Net,
    assert_same_tensors,
    fit_model,
    make_trainer,
    outputs,
    own_random_stream,
)
from support.runs.with_callback import BATCHES, TARGETS

KINDS = ("adapter", "merged", "full")
STAGES = ("fit", "validate", "test", "predict")


class Tokens(Net):
    """A network with an embedding before it."""

    def build_body(self) -> None:
        super().build_body()
        with own_random_stream(5):
            self.table = nn.Embedding(4, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table((x[:, 0] > 0).long()))


CASES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "ranks": (Net, {"rank_pattern": {"head": 1}, "alpha_pattern": {"0": 3}}),
    "all but one": (Net, {"target_modules": "all-linear", "exclude_modules": ["head"]}),
    "dropout": (Net, {"lora_dropout": 0.3}),
    "more is trained": (Net, {"modules_to_save": ["body.1"], "bias": "all", "use_rslora": True}),
    "magnitudes": (Net, {"use_dora": True}),
    "from the weight": (Net, {"init_lora_weights": "pissa", "use_rslora": True}),
    "LoHa": (Net, {"variant": "loha", "r": 1}),
    "parts": (Net, {"enable_lora": {"body.0": [True, False]}}),
    "parameters": (Net, {"target_modules": [], "target_parameters": ["body.0.weight", "head.weight"]}),
    "rows": (Tokens, {"trainable_token_indices": {"table": [1, 3]}}),
    "built in setup": (BuiltInSetup, {}),
    "built in configure_model": (BuiltInConfigureModel, {"exclude_modules": "head"}),
}


class Losses(L.Callback):
    """Keeps the loss of each validation."""

    def __init__(self) -> None:
        self.of: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.of.append(float(trainer.callback_metrics["val_loss"]))


def state(trainer: L.Trainer) -> dict[str, Any]:
    return {
        "model": trainer.lightning_module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "steps": trainer.global_step,
    }


def fit(path: Path, model: Net, *callbacks: L.Callback, epochs: int, seed: int, **given: Any) -> L.Trainer:
    saves = ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False)
    trainer = make_trainer(path, *callbacks, saves, max_epochs=epochs)
    torch.manual_seed(seed)
    trainer.fit(model, Data(BATCHES), **given)
    return trainer


Uninterrupted = Callable[[str, str], tuple[Path, dict[str, Any], list[float]]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The folder of a run's checkpoints, its last state and its losses."""

    @cache
    def run(case: str, kind: str) -> tuple[Path, dict[str, Any], list[float]]:
        path, losses = tmp_path_factory.mktemp("run"), Losses()
        model_class, options = CASES[case]
        lora = LoRACallback(save=kind, **{"r": 2, "target_modules": TARGETS} | options)  # type: ignore[arg-type]
        return path, state(fit(path, model_class(), lora, losses, epochs=3, seed=0)), losses.of

    return run


@pytest.mark.parametrize(("kind", "stage", "case"), covering(KINDS, STAGES, [*CASES], meet=1))
@pytest.mark.filterwarnings("ignore:The dirpath has changed from", "ignore:Be aware that when using `ckpt_path`")
def test_options_that_were_left_out_are_the_checkpoints_and_it_is_said(
    tmp_path, uninterrupted, caplog, stage: str, kind: str, case: str
):
    path, ended, losses = uninterrupted(case, kind)
    caplog.set_level("INFO", "lightning_lora")
    model, lora = CASES[case][0](), LoRACallback(save=kind)  # type: ignore[arg-type]
    given: dict[str, Any] = {"ckpt_path": path / "epoch=1.ckpt", **PLAIN_TYPES_ONLY}
    if stage == "fit":
        trainer = fit(tmp_path, model, lora, epochs=3, seed=1, **given)
        if case != "dropout":  # whose masks come from the seed
            assert_same_tensors(state(trainer), ended)
        (saved, again) = (torch.load(each / "last.ckpt", weights_only=True)["lora"] for each in (path, tmp_path))
        assert again["config"] == saved["config"]
        assert caplog.text.count("the checkpoint's.") == 1
        with disable_adapter(model):
            assert torch.equal(outputs(model), outputs(trained_base(case)))
        return
    trainer, data = make_trainer(tmp_path, lora), Data(BATCHES)
    if stage == "predict":
        labels = torch.cat([batch[1] for batch in data.predict_dataloader()])
        loss = float(F.cross_entropy(torch.cat(trainer.predict(model, data, **given)), labels))
    else:
        (metrics,) = getattr(trainer, stage)(model, data, verbose=False, **given)
        loss = metrics[{"validate": "val_loss", "test": "test_loss"}[stage]]
    assert caplog.text.count("the checkpoint's.") == 1
    assert loss == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[1] - losses[2]) > 1e-4  # else any checkpoint would do


def trained_base(case: str) -> Net:
    """The model before training; one that builds itself late has done so."""
    model = CASES[case][0]()
    model.setup("fit")
    model.configure_model()
    return model


def saved(path: Path, *, name: str = "a.ckpt", model: Net | None = None, **options: Any) -> Path:
    """A checkpoint of a short fit."""
    lora = LoRACallback() if model is not None else LoRACallback(**{"r": 2, "target_modules": TARGETS} | options)
    fit_model(path, model or Net(), lora, data=Data(BATCHES), saved=path / name)
    return path / name


def loaded_outputs(file: Path) -> torch.Tensor:
    load_adapter(model := Net(), file)
    return outputs(model)


# --- an option that was given ---


@pytest.mark.parametrize(
    ("saved_with", "lora", "difference"),
    [
        ({"use_dora": True}, LoRACallback(use_dora=False), "use_dora was True, now False"),
        (
            {"variant": "loha", "r": 8, "target_modules": "all-linear"},
            LoRACallback(variant="lora"),
            r"variant was 'loha', now 'lora'",
        ),
        (
            {},
            LoRACallback(LoRAConfig(use_rslora=True)),
            r"r was 2, now 8; target_modules was .*, now 'all-linear'; use_rslora was False, now True",
        ),
    ],
)
def test_given_option_that_differs_from_the_checkpoints_is_an_error_that_names_it_alone(
    tmp_path, saved_with: dict[str, Any], lora: LoRACallback, difference: str
):
    file = saved(tmp_path, **saved_with)
    trainer = make_trainer(tmp_path, lora, max_epochs=2)
    for door in (trainer.fit, trainer.test):
        with pytest.raises(LoRAError, match=rf"The options differ: {difference}\. .*leave them out of LoRACallback"):
            door(Net(), Data(BATCHES), ckpt_path=file, **PLAIN_TYPES_ONLY)


@UNTRAINED_NOTICE
def test_a_peft_folder_for_a_checkpoint_is_an_error_with_the_call_that_loads_it(tmp_path):
    folder = tmp_path / "folder"
    inject(model := Net(), LoRAConfig(r=2))
    save_adapter(model, folder)
    said = (
        rf"folder: is a PEFT folder, and no checkpoint\. Call load_adapter\(model, '{folder}'\) instead; .*no ckpt_path"
    )
    for net in (Net(), model):
        with pytest.raises(LoRAError, match=said):
            make_trainer(tmp_path, LoRACallback()).test(net, Data(BATCHES), ckpt_path=folder)
    with pytest.raises(LoRAError, match=said):
        load_from_checkpoint(Net, folder)
    said = r"adapter_model\.safetensors: is a safetensors file, and no checkpoint\. Call load_adapter"
    trainer = make_trainer(tmp_path, LoRACallback())
    with pytest.raises(LoRAError, match=said):
        trainer.test(Net(), Data(BATCHES), ckpt_path=folder / "adapter_model.safetensors")
    load_adapter(again := Net(), folder)  # what the error says
    make_trainer(tmp_path, LoRACallback()).test(again, Data(BATCHES), verbose=False)
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("given", [{"variant": "dora"}, {"lora_dropout": 0.2}])
def test_given_option_stands_beside_the_checkpoints(tmp_path, given: dict[str, Any]):
    file = saved(tmp_path, use_dora=True, lora_dropout=0.1)
    make_trainer(tmp_path, LoRACallback(**given)).test(model := Net(), Data(BATCHES), ckpt_path=file, verbose=False)
    assert torch.equal(outputs(model), loaded_outputs(file))
    assert model.head.lora.spec.dropout == given.get("lora_dropout", 0.1)


# --- which checkpoint ---


def as_best(path: Path, lora: LoRACallback) -> tuple[Net, Path]:
    """After a fit of a model that was injected by hand, by the same Trainer and the same callback."""
    inject(first := Net(), LoRAConfig(r=2, target_modules=["head"]))
    trainer = fit(path, first, lora, epochs=1, seed=0)
    trainer.test(model := Net(), Data(BATCHES), ckpt_path="best", verbose=False, **PLAIN_TYPES_ONLY)
    return model, path / "epoch=0.ckpt"


def as_last(path: Path, lora: LoRACallback) -> tuple[Net, Path]:
    saved(path, name="last.ckpt")
    fit(path, model := Net(), lora, epochs=2, seed=0, ckpt_path="last", **PLAIN_TYPES_ONLY)
    return model, path / "last.ckpt"


def as_hpc(path: Path, lora: LoRACallback) -> tuple[Net, Path]:
    file = saved(path, name="hpc_ckpt_1.ckpt")
    make_trainer(path, lora).test(model := Net(), Data(BATCHES), ckpt_path="hpc", verbose=False, **PLAIN_TYPES_ONLY)
    return model, file


def as_attribute(path: Path, lora: LoRACallback) -> tuple[Net, Path]:
    trainer = make_trainer(path, lora)
    trainer.ckpt_path = saved(path)
    trainer.test(model := Net(), Data(BATCHES), verbose=False, **PLAIN_TYPES_ONLY)
    return model, path / "a.ckpt"


def beside_objects(path: Path, lora: LoRACallback) -> tuple[Net, Path]:
    file = saved(path)
    torch.save(torch.load(file, weights_only=True) | {"objects": [Losses()]}, file)
    make_trainer(path, lora).test(model := Net(), Data(BATCHES), ckpt_path=file, verbose=False, **ANY_OBJECTS)
    return model, file


def by_a_trainer_in_a_hook(path: Path, lora: LoRACallback) -> tuple[Net, Path]:
    file, model = saved(path), Net()

    class Tests(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            make_trainer(path, lora).test(model, Data(BATCHES), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY)

    make_trainer(path, lora, Tests()).fit(outer := Net(), Data(BATCHES))
    assert outer.head.lora_A.shape[0] == 8
    return model, file


WAYS = (
    *(as_best, as_last, as_hpc, as_attribute),
    *(beside_objects, by_a_trainer_in_a_hook),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_checkpoint_is_found_however_the_trainer_is_told(tmp_path, way: Callable[[Path, LoRACallback], Any]):
    model, file = way(tmp_path, LoRACallback(merged_eval=False))
    assert model.head.lora_A.shape[0] == 2
    assert torch.equal(outputs(model), loaded_outputs(file))


@UNTRAINED_NOTICE
def test_run_without_a_checkpoint_does_not_take_the_options_of_the_run_before(tmp_path):
    """trainer.ckpt_path still is that run's when the next setup begins."""
    trainer = make_trainer(tmp_path, LoRACallback())
    trainer.test(Net(), Data(BATCHES), ckpt_path=saved(tmp_path), verbose=False, **PLAIN_TYPES_ONLY)
    trainer.test(model := Net(), Data(BATCHES), verbose=False)
    assert model.head.lora_A.shape[0] == 8


@pytest.mark.slow
@pytest.mark.usefixtures("as_program")
@pytest.mark.parametrize(("cli", "r"), [(LoRACLI, 8), (LightningCLI, 8), (LoRACLI, 3)])  # 8 is the default
def test_option_at_its_default_in_a_cli_counts_as_left_out_and_it_is_said(
    tmp_path, caplog, cli: type[LightningCLI], r: int
):
    caplog.set_level("INFO", "lightning_lora")
    block = f"lora: {{r: {r}, bias: none}}"
    if cli is LightningCLI:
        block = f"trainer: {{callbacks: [{{class_path: lightning_lora.LoRACallback, init_args: {{r: {r}}}}}]}}"
    Path("c.yaml").write_text(block)
    file = saved(tmp_path, lora_alpha=3)
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    args = ["test", "--config=c.yaml", f"--ckpt_path={file}", "--verbose=false", *quiet]
    with nullcontext() if r == 8 else pytest.raises(LoRAError, match=r"The options differ: r was 2, now 3\. "):
        run = cli(Net, Data, args=args, save_config_callback=None, seed_everything_default=1)
        assert torch.equal(outputs(run.model), loaded_outputs(file))
        assert f"lightning_lora: r=2, lora_alpha=3, target_modules={tuple(TARGETS)} are the ch" in caplog.text


# --- which model ---


def test_injected_model_keeps_its_options_and_the_error_names_the_remedy(tmp_path):
    one, other = saved(tmp_path), saved(tmp_path, name="b.ckpt", r=1)
    trainer, model = make_trainer(tmp_path, LoRACallback()), Net()
    for file in (one, other):
        if file == other:
            with pytest.raises(LoRAError, match=r"options differ: .*If the model already has an adapter.* unload\("):
                trainer.test(model, Data(BATCHES), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY)
            unload(model)
        trainer.test(model, Data(BATCHES), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY)
        assert torch.equal(outputs(model), loaded_outputs(file))


def test_checkpoint_that_cannot_be_read_is_the_trainers_own_error(tmp_path):
    (cut := tmp_path / "cut.ckpt").write_bytes(saved(tmp_path).read_bytes()[:-100])
    trainer = make_trainer(tmp_path, LoRACallback())
    for path in (cut, tmp_path / "gone.ckpt"):
        with pytest.raises((OSError, RuntimeError)):
            trainer.test(Net(), Data(BATCHES), ckpt_path=path, **PLAIN_TYPES_ONLY)
