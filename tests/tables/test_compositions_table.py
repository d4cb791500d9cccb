"""The table of compositions: each row is run in small, and its outcome is what came of it.

"right" is said by `compare` in support/runs/with_callback.py: evaluated merged and unmerged, the same numbers and the
same training bit for bit, the base untouched and the model unmerged after. With WRITE_TABLE=1 in the environment the
first test writes the table.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_lora import LoRACallback, LoRAError, LoRAWeightAveraging
from support.runs.lightning_versions import HAS_WEIGHT_AVERAGING, EMAWeightAveraging, WeightAveraging
from support.runs.shortcuts import let_collections_pass_over_what_is_there
from support.runs.training import BuiltInConfigureModel, Data, Net, SizedData, TwoLoaders, make_trainer
from support.runs.with_callback import At, Backboned, Manual, Watched, compare

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning_lora. base parameters were unfrozen",
    "ignore:The provided params to be frozen already exist",
    "ignore:lightning_lora. the adapters of 2 layers are frozen",
    "ignore:Found . module.s. in eval mode at the start of training",
    "ignore:lightning_lora. merged 16-bit weights",
    "ignore:`.fit.ckpt_path=None.` was called without a model",
    "ignore:.*ckpt_path=.last.. is set, but there is no last checkpoint",
)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    let_collections_pass_over_what_is_there()  # the batch size finder collects garbage at each trial


Case = Callable[[Path], Any]
Others = Callable[[Path], list[L.Callback]]


def fitted(
    others: Others = lambda path: [], model: type[Net] = Watched, data: Any = Data, first: bool = True, **options: Any
) -> Case:
    """A fit with other callbacks, listed after ours unless `first` is false, and a test after it."""
    of_compare = ("always", "base_stays", "tolerance", "r", "target_modules", "lora_dropout", "lora_alpha", "variant")
    choices = {name: options.pop(name) for name in of_compare if name in options}

    def run(path: Path, net: Net, callback: LoRACallback) -> None:
        beside = others(path)
        callbacks = [callback, *beside] if first else [*beside, callback]
        make_trainer(path, *callbacks, **{"max_epochs": 2} | options).fit(net, data())
        make_trainer(path, callback, precision=options.get("precision")).test(net, Data(), verbose=False)

    return lambda path: compare(path, run, model, **choices)


def interrupted(error: type[BaseException]) -> Case:
    def fail(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise error

    def run(path: Path, net: Net, callback: LoRACallback) -> None:
        hook = At("on_validation_batch_end", fail, lambda trainer: trainer.current_epoch == 1)
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            make_trainer(path, callback, OnExceptionCheckpoint(path), hook, max_epochs=2).fit(net, Data())
        make_trainer(path, callback).fit(net.train(), Data())

    return lambda path: compare(path, run)


def evaluated(path: Path) -> None:
    def run(path: Path, net: Net, callback: LoRACallback) -> None:
        trainer = make_trainer(path, callback)
        for stage in ("validate", "test", "predict", "fit", "predict", "test", "validate"):
            getattr(trainer, stage)(net, Data())

    compare(path, run)


def set_up(strategy: Strategy, *others: L.Callback) -> Case:
    """Only the setup of a fit, which is as far as it comes."""

    def run(path: Path) -> None:
        callback = LoRACallback(r=2)
        trainer = make_trainer(path, callback, *others)
        trainer._accelerator_connector.strategy = strategy
        trainer.state.fn = TrainerFn.FITTING
        callback.setup(trainer, Net(), "fit")
        raise AssertionError(f"{strategy} was not refused")

    return run


def launching(name: str) -> Strategy:
    return L.Trainer(accelerator="cpu", strategy=name, logger=False, enable_checkpointing=False).strategy


class Transformer(Watched):
    def build_body(self) -> None:
        self.embed = nn.Linear(6, 8)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embed(x)[None])
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0][0])


class TiedHead(Watched):
    def build_head(self) -> None:
        super().build_head()
        self.embed = nn.Embedding(3, 8, _weight=self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x) + self.embed(x[:, 0].abs().long().clamp(max=2)))


class WeightNorm(Watched):
    def build_head(self) -> None:
        super().build_head()
        weight_norm(self.head)


class SpectralNorm(Watched):
    def build_head(self) -> None:
        super().build_head()
        spectral_norm(self.head)


class EvaluationMode(Watched):
    """As from_pretrained gives it."""

    def build_body(self) -> None:
        super().build_body()
        self.body.eval()


class CompiledPart(Watched):
    def build_body(self) -> None:
        super().build_body()
        self.body = torch.compile(self.body, backend="eager")


class LateBuilt(BuiltInConfigureModel, Watched):
    pass


def everything(path: Path) -> list[L.Callback]:
    return [
        EarlyStopping("val_loss"),
        ModelCheckpoint(path, monitor="val_loss"),
        Timer("00:00:05:00"),
        GradientAccumulationScheduler({1: 2}),
    ]


def mean() -> L.Callback:
    return WeightAveraging()


def ema() -> L.Callback:
    return EMAWeightAveraging(decay=0.8)


def swa() -> L.Callback:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


def with_(make: Callable[[], L.Callback], **options: Any) -> Case:
    return fitted(lambda path: [make()], base_stays=False, **options)


def tune() -> L.Callback:
    return BackboneFinetuning(1, should_align=False)


def precise(precision: str, tolerance: float = 1e-5) -> Case:
    return fitted(precision=precision, tolerance=tolerance, base_stays=False)


NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
DEEPSPEED = type("DeepSpeedStrategy", (DDPStrategy,), {"config": NVME})  # by name: its package is seldom there
ROWS: dict[str, Case] = {
    "sanity check, several validations in an epoch": fitted(num_sanity_val_steps=2, val_check_interval=1),
    "several dataloaders": fitted(data=TwoLoaders),
    "accumulate_grad_batches, overfit_batches": fitted(accumulate_grad_batches=2, overfit_batches=2),
    "fast_dev_run": fitted(fast_dev_run=True),
    "manual optimization, several optimizers": fitted(model=Manual),
    "validate, test and predict before and after fit": evaluated,
    "LearningRateFinder": with_(lambda: LearningRateFinder(num_training_steps=3, attr_name="lr"), always=False),
    "BatchSizeFinder": with_(lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1), data=SizedData),
    "an exception in validation, OnExceptionCheckpoint": interrupted(RuntimeError),
    "Ctrl-C in validation, OnExceptionCheckpoint": interrupted(KeyboardInterrupt),
    "EarlyStopping, ModelCheckpoint, Timer, GradientAccumulationScheduler": fitted(everything),
    "RichProgressBar, ModelSummary": fitted(
        lambda path: [RichProgressBar(), ModelSummary()], enable_progress_bar=True, enable_model_summary=True
    ),
    "BackboneFinetuning before LoRACallback": with_(tune, first=False, model=Backboned),
    "BackboneFinetuning after LoRACallback, with a warning": with_(tune, model=Backboned),
    "WeightAveraging after LoRACallback": with_(mean),
    "WeightAveraging before LoRACallback": with_(mean, first=False),
    "EMAWeightAveraging after LoRACallback": with_(ema),
    "EMAWeightAveraging before LoRACallback": with_(ema, first=False),
    "LoRAWeightAveraging after LoRACallback": fitted(lambda path: [LoRAWeightAveraging(0.8)]),
    "LoRAWeightAveraging before LoRACallback": with_(LoRAWeightAveraging, first=False),
    "StochasticWeightAveraging after LoRACallback": with_(swa),
    "StochasticWeightAveraging before LoRACallback": with_(swa, first=False),
    "two LoRACallbacks": set_up(launching("auto"), LoRACallback(r=4)),
    'precision="bf16-mixed"': precise("bf16-mixed", 4 * 2**-8),
    'precision="bf16-true"': precise("bf16-true", 4 * 2**-8),
    'precision="16-true"': precise("16-true", 4 * 2**-11),
    'precision="64-true"': precise("64-true"),
    "TransformerEncoder, MultiheadAttention": fitted(model=Transformer, target_modules="all-linear"),
    "a head tied to an embedding": fitted(model=TiedHead),
    "a backbone in evaluation mode, with lora_dropout": fitted(model=EvaluationMode, lora_dropout=0.3),
    'variant="loha"': fitted(variant="loha", r=1),
    "layers built in configure_model": fitted(model=LateBuilt, base_stays=False),
    "torch.compile of a submodule": fitted(model=CompiledPart, base_stays=False),
    "weight_norm": fitted(model=WeightNorm),
    "spectral_norm": fitted(model=SpectralNorm),
    "ddp_spawn without inject()": set_up(launching("ddp_spawn")),
    "ddp_fork without inject()": set_up(launching("ddp_fork")),
    "ddp_notebook without inject()": set_up(launching("ddp_notebook")),
    "FSDPStrategy(use_orig_params=False)": set_up(FSDPStrategy(use_orig_params=False)),
    "DeepSpeedStrategy with parameters on NVMe": set_up(DEEPSPEED()),
}


def outcome(case: Case, path: Path) -> str:
    """right, or refused with the error's first line; anything else is an error of the case."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            case(path)
    except LoRAError as error:
        return f"refused: {str(error).splitlines()[0]}"
    return "right"


def render(outcomes: dict[str, str]) -> str:
    rows = [f"| {name} | {found.replace('|', chr(92) + '|')} |" for name, found in outcomes.items()]
    return "\n".join(["| composition | outcome |", "|---|---|", *rows])


README = Path(__file__).parents[1] / "README.md"
BEGIN, END = (
    "<!-- compositions: written by tests/tables/test_compositions_table.py -->\n",
    "<!-- end of compositions -->",
)
ADDED = (
    "WeightAveraging ",
    "EMAWeightAveraging ",
    "LoRAWeightAveraging ",
)  # rows of what the oldest supported Lightning does not have
LAUNCHED = {f"{strategy} after inject()": strategy for strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook")}


def readme_rows() -> dict[str, str]:
    """The README's outcome of each composition."""
    lines = README.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    cells = (re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines)
    return {name: found.replace(r"\|", "|") for name, found in cells}


def outcome_of_a_launcher(found: dict[str, Any]) -> str:
    assert all(found[name] for name in ("arrived", "base", "trained", "saved after"))
    assert not found["merged"]
    return "right"


def write_rows(path: Path, launched: dict[str, Any]) -> None:
    outcomes = {name: outcome(case, path / str(i)) for i, (name, case) in enumerate(ROWS.items())}
    outcomes |= {name: outcome_of_a_launcher(launched[strategy]) for name, strategy in LAUNCHED.items()}
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{render(outcomes)}\n\n{END}{rest.split(END)[1]}")


def test_the_readme_has_these_rows(tmp_path, request: pytest.FixtureRequest):
    if os.environ.get("WRITE_TABLE"):
        write_rows(tmp_path, request.getfixturevalue("launched"))
    assert list(readme_rows()) == [*ROWS, *LAUNCHED]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ROWS if HAS_WEIGHT_AVERAGING or not n.startswith(ADDED)])
def test_a_composition_gives_the_outcome_in_the_readme(tmp_path, name: str):
    assert outcome(ROWS[name], tmp_path) == readme_rows()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_after_inject_gives_the_outcome_in_the_readme(launched: dict[str, Any], name: str):
    assert outcome_of_a_launcher(launched[LAUNCHED[name]]) == readme_rows()[name]
