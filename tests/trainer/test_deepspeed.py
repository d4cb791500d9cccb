"""DeepSpeedStrategy with ZeRO stages 1 to 3: as one device, on any number of ranks, in every door."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.command.info import info
from support.models.quantized import OF_BITSANDBYTES, OUTPUTS, QuantizedNet, factors, inputs, packed_bits
from support.ranks.deepspeed import gathered_by_deepspeed, zero
from support.ranks.fits import Case, Run, State, alone, assert_close, assert_run_equals_one_device_and_is_resumed, fit
from support.ranks.processes import world
from support.ranks.sharded import TARGETS, Plain, base_of, data, loader, make_trainer
from support.ranks.sharded_adapters import Plus, Scheduled, assert_same_bits
from support.ranks.strategies import import_package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
]


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    """Its import takes a while, which is no part of a test's time."""
    world().run(import_package, "deepspeed", timeout=240)


class GroupWithoutParameters(Plain):
    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW([{"params": []}, {"params": trained}], lr=0.05)


class TrainedAlone(Plain):
    """The parameters that DeepSpeed gives to an optimizer of its own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


UNTESTED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def config(stage: int, **zero_options: Any) -> dict[str, Any]:
    """DeepSpeed's own configuration, with options that DeepSpeedStrategy has no argument for."""
    return {"config": {**UNTESTED, "zero_optimization": {"stage": stage, **zero_options}}}


@dataclass
class OfDeepSpeed(Case):
    stage: int = 2

    def on_ranks(self, path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        return zero(path, *callbacks, stage=self.stage, options=self.strategy, **options)

    def gathered(self, trainer: Any) -> State:
        return gathered_by_deepspeed(trainer)

    def after_fit(self, model: Plain) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # Lightning moves them to the CPU after a fit on a GPU


ALL_DIVIDED = {"stage3_param_persistence_threshold": 0}  # else small parameters stay gathered
CASES = {
    "stage 1, optimizer on the CPU": OfDeepSpeed(stage=1, strategy=config(1, offload_optimizer={"device": "cpu"})),
    "stage 1, SGD, a scheduler": OfDeepSpeed(stage=1, model=Scheduled),
    "stage 2, a group without parameters": OfDeepSpeed(model=GroupWithoutParameters),
    "stage 2, an optimizer of DeepSpeed's config": OfDeepSpeed(
        model=TrainedAlone,
        strategy={
            "config": {
                "zero_optimization": {"stage": 2},
                "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.01, "torch_adam": True}},
            }
        },
    ),
    "stage 2, modules_to_save": OfDeepSpeed(lora={"target_modules": ["0", "2"], "modules_to_save": ["4"]}),
    "stage 2, LoRA-GA": OfDeepSpeed(lora={"init_lora_weights": "lora_ga"}),
    "stage 3, LoRA+, groups cut": OfDeepSpeed(
        stage=3, model=Plus, strategy=config(3, sub_group_size=20, **ALL_DIVIDED)
    ),
    "stage 3, all on the CPU": OfDeepSpeed(
        stage=3, strategy=config(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    ),
    "stage 3, SGD, a scheduler, clipped": OfDeepSpeed(stage=3, model=Scheduled, trainer={"gradient_clip_val": 0.1}),
    "stage 3, DoRA, modules_to_save": OfDeepSpeed(
        stage=3, lora={"use_dora": True, "target_modules": ["0", "2"], "modules_to_save": ["4"]}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_run_equals_one_device_and_is_resumed_exactly_by_ranks_and_by_one_device(tmp_path, name):
    assert_run_equals_one_device_and_is_resumed(CASES[name], tmp_path)


# --- files ---


class Evaluated(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()


def evaluate(path: Path, stage: int, save: str, source: Path, precision: str = "32-true") -> float:
    torch.manual_seed(9)
    model, callback = Evaluated(), LoRACallback(r=2, target_modules=TARGETS, save=save)
    base = {
        name: value.to(torch.bfloat16) if "bf16" in precision else value.clone()
        for name, value in model.state_dict().items()
    }
    trainer = zero(path, callback, stage=stage, precision=precision)
    trainer.test(model, data()[1], ckpt_path=source, verbose=False)
    if save != "full":
        assert_same_bits(base_of(gathered_by_deepspeed(trainer)), base)
    return model.losses[-1]


BASE = sorted(f"net.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias"))
FACTORS = sorted(f"net.{i}.lora_{leaf}" for i in (0, 2, 4) for leaf in "AB")


def test_full_checkpoint_of_stage_2_is_read_in_every_door(tmp_path):
    case = OfDeepSpeed(lora={"save": "full"})
    run = world().run(fit, case, tmp_path / "fit", 2)[0]
    for name in ("all.ckpt", "weights.ckpt"):
        file = tmp_path / "fit" / name
        content = torch.load(file, weights_only=True)
        assert sorted(content["state_dict"]) == sorted(BASE + FACTORS)
        assert ("optimizer_states" in content) == (name == "all.ckpt")
        assert world().run(evaluate, tmp_path, 1, "full", file) == pytest.approx([run.losses[-1]] * 2, abs=1e-6)
        loaded = load_from_checkpoint(Plain, file)
        assert_same_bits(dict(loaded.state_dict()), run.state)
        assert info(file)["kind"] == "Lightning checkpoint of kind 'full'"
    expected = alone(case, tmp_path / "alone", 3)
    for found in world().run(fit, case, tmp_path / "second", 3, run.file, 5):
        assert_close(found, expected, 1)


# --- what cannot be resumed ---


BFLOAT16_OPTIMIZER = OfDeepSpeed(
    stage=1,
    trainer={"precision": "bf16-true"},
    strategy={"config": {**UNTESTED, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}},
)


def error_of(case: Case, path: Path, source: Path | None = None) -> str:
    try:
        fit(case, path, 2, source)
    except LoRAError as error:
        return str(error)
    return ""


def test_what_cannot_be_resumed_is_an_error_with_the_remedy(tmp_path):
    run = world().run(fit, OfDeepSpeed(), tmp_path, 1)[0]
    for case, source, said in (
        (BFLOAT16_OPTIMIZER, None, "DeepSpeed made a BF16_Optimizer, whose states cannot be put together"),
        (OfDeepSpeed(), tmp_path / "weights.ckpt", "holds weights only, without the optimizer's state"),
        (
            OfDeepSpeed(model=Plus),
            run.file,
            "have groups of [[12]] parameters, and configure_optimizers built groups of [[3, 3]]",
        ),
    ):
        for error in world().run(error_of, case, tmp_path / "second", source):
            assert said in error
            assert error.startswith(("LoRACallback:", str(tmp_path)))


# --- quantized bases, 16 bits, buffers ---


def batches(size: int, rank: int) -> DataLoader[Any]:
    labels = torch.randint(OUTPUTS, (12,), generator=torch.Generator().manual_seed(1))
    rows = TensorDataset(inputs(12, 1), labels)
    sampler: DistributedSampler[Any] = DistributedSampler(rows, size, rank, shuffle=False)
    return DataLoader(rows, batch_size=4 // size, sampler=sampler)


def quantized(path: Path, kind: str, stage: int = 2) -> str:
    """The error, if any; where there is none, the run is right."""
    size, rank = dist.get_world_size(), dist.get_rank()
    models = [QuantizedNet(kind) for _ in range(3)]
    for model, source in zip(models[:2], (None, path / "last.ckpt"), strict=True):
        trainer = zero(path, LoRACallback(r=2, lora_alpha=4, seed=1), stage=stage, max_epochs=2)
        try:
            trainer.fit(model, batches(size, rank), batches(size, rank), ckpt_path=source)
        except LoRAError as error:
            return str(error)
        trainer.save_checkpoint(path / "last.ckpt")
        assert packed_bits(model) == packed_bits(models[2])
    torch.manual_seed(rank)
    assert_same_bits(factors(models[1]), factors(models[0]))
    return ""


@pytest.mark.parametrize("kind", ["nf4", "int8", "Int8WeightOnlyConfig"])
def test_base_of_bitsandbytes_is_right_and_one_of_torchao_is_refused(tmp_path, kind):
    QuantizedNet(kind)  # skips where its package is missing
    for error in world().run(quantized, tmp_path, kind):
        if kind in OF_BITSANDBYTES:
            assert error == ""
        else:
            assert "which DeepSpeed cannot move to its device. Use strategy='ddp', or quantize" in error
    if kind in OF_BITSANDBYTES:
        for error in world().run(quantized, tmp_path, kind, 3):
            assert "DeepSpeed's stage 3 would divide its bytes. Use DeepSpeedStrategy(stage=2)" in error


class Halved(Plain):
    """Saves another value of a factor than it trains."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0.lora_A"] = checkpoint["state_dict"]["net.0.lora_A"] / 2


def halved(path: Path) -> torch.Tensor:
    torch.manual_seed(0)
    trainer = zero(path, LoRACallback(r=2, target_modules=TARGETS), stage=2, max_epochs=1, precision="bf16-true")
    trainer.fit(model := Halved(), *data())
    trainer.save_checkpoint(path / "halved.ckpt")
    return model.net[0].lora_A.detach().clone()


def test_value_that_something_else_wrote_into_a_checkpoint_stays(tmp_path):
    trained = world().run(halved, tmp_path)[0]
    saved = torch.load(tmp_path / "halved.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.0.lora_A"], trained / 2)
    assert saved["net.2.lora_A"].dtype == torch.float32


def in_16_bits(
    path: Path, precision: str, lora: dict[str, Any], epochs: int, source: Path | None = None, stage: int = 2
) -> Run:
    case = OfDeepSpeed(stage=stage, lora=lora, trainer={"precision": precision})
    return fit(case, path, epochs, source, seed=5 if source else 0)


@pytest.mark.parametrize(
    ("stage", "precision", "lora"),
    [
        (2, "bf16-true", {"init_lora_weights": "pissa"}),
        (2, "bf16-true", {"modules_to_save": ["4"], "target_modules": ["0", "2"]}),
        (2, "bf16-mixed", {"save": "merged"}),
        (3, "bf16-true", {"save": "merged"}),
        (3, "bf16-true", {"use_dora": True}),
    ],
    ids=str,
)
def test_bfloat16_run_is_resumed_from_float32_values(tmp_path, precision, lora, stage):
    whole = world().run(in_16_bits, tmp_path / "whole", precision, lora, 3, None, stage)[0]
    base = {name: value.to(torch.bfloat16) for name, value in Plain().state_dict().items()}
    assert_same_bits(*({name: state[name] for name in whole.frozen} for state in (whole.state, base)))
    first = world().run(in_16_bits, tmp_path / "first", precision, lora, 2, None, stage)[0].file
    content = torch.load(first, weights_only=True)
    values = content["lora"]["adapter"] if lora.get("save") == "merged" else content["state_dict"]
    float32 = {n: v for n, v in values.items() if v.dtype == torch.float32 and not torch.equal(v, v.bfloat16().float())}
    assert {"net.0.lora_A", "net.2.lora_B"} <= float32.keys()
    for found in world().run(in_16_bits, tmp_path / "second", precision, lora, 3, first, stage):
        assert_same_bits(found.state, whole.state)
        assert found.losses == whole.losses[2:]


def test_bfloat16_file_evaluates_as_the_run_did(tmp_path):
    run = world().run(in_16_bits, tmp_path, "bf16-true", {}, 2)[0]
    for stage in (1, 3):
        assert world().run(evaluate, tmp_path, stage, "adapter", run.file, "bf16-true") == [run.losses[-1]] * 2


def in_float16(path: Path, epochs: int, source: Path | None = None, stage: int = 2) -> Run:
    """Float16, which DeepSpeed refuses on a CPU; its scale of the loss changes at every second step."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    scale = {"loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 2}
    case = OfDeepSpeed(stage=stage, trainer={"precision": "16-mixed"}, strategy=scale)
    return fit(case, path, epochs, source, seed=5 if source else 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_scale_of_the_loss_is_resumed(tmp_path, stage):
    whole = world().run(in_float16, tmp_path / "whole", 3, None, stage)[0]
    first = world().run(in_float16, tmp_path / "first", 2, None, stage)[0].file
    for found in world().run(in_float16, tmp_path / "second", 3, first, stage):
        assert_same_bits(found.state, whole.state)
    scales = [
        torch.load(path, weights_only=True)["optimizer_states"][0]["loss_scale"]["cur_scale"]
        for path in (tmp_path / "second" / "all.ckpt", whole.file)
    ]
    assert scales[0] == scales[1] > 2**8


@pytest.mark.parametrize("stage", [2, 3])
def test_statistics_of_normalisation_are_those_of_rank_zero_in_a_checkpoint(tmp_path, stage):
    """DeepSpeed lets each rank have its own; a checkpoint of its own holds rank 0's too."""
    case = OfDeepSpeed(stage=stage, model=Normalised)
    first = world().run(fit, case, tmp_path, 1)
    saved = torch.load(first[0].file, weights_only=True)["state_dict"]
    buffers = {name: value for name, value in first[0].state.items() if "running" in name}
    assert_same_bits({name: saved[name] for name in buffers}, buffers)
    assert not torch.equal(first[1].state["norm.running_mean"], buffers["norm.running_mean"])
    again = world().run(fit, case, tmp_path / "again", 1, first[0].file)
    for found in again:  # nothing is left to train
        assert_same_bits({name: found.state[name] for name in buffers}, buffers)


class LoadingInForward(Plain):
    """Loads the adapter inside the engine's forward, where stage 3 gathers a parameter when it is looked at."""

    source: Path

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            load_adapter(self, self.source)
        super().validation_step(batch, batch_idx)


def swapped(path: Path, source: Path, stage: int | None) -> Run:
    torch.manual_seed(0)
    model = LoadingInForward()
    model.source = source
    callback = LoRACallback(r=2, target_modules=TARGETS)
    if stage is None:
        make_trainer(path, callback, max_epochs=2).fit(model, loader(), loader(seed=6))
        return Run(dict(model.state_dict()), model.losses, path)
    (trainer := zero(path, callback, stage=stage, max_epochs=2)).fit(model, *data())
    trainer.save_checkpoint(path / "all.ckpt")
    return Run(gathered_by_deepspeed(trainer), model.losses, path / "all.ckpt")


def adapter_of_rank(rank: int, path: Path) -> Path:
    torch.manual_seed(7)
    inject(net := Plain(), LoRAConfig(r=rank, target_modules=TARGETS))
    for name, parameter in net.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    save_adapter(net, path)
    return path


def test_adapter_that_is_loaded_within_a_forward_of_stage_3_acts_at_once(tmp_path):
    source = adapter_of_rank(2, tmp_path / "other")
    expected = swapped(tmp_path, source, None)
    for found in world().run(swapped, tmp_path, source, 3):
        assert_close(found, expected, 2)


OTHER_RANK = {
    2: r"adapter: 'net.0' is trained by DeepSpeed, and has rank 2, the adapter 3: ",
    3: r"adapter: 'net.0' is sharded, and has rank 2, the adapter 3: ",
}


@pytest.mark.parametrize("stage", OTHER_RANK)
def test_adapter_of_another_rank_is_refused_between_steps(tmp_path, stage):
    source = adapter_of_rank(3, tmp_path / "other")
    for said, before, after in world().run(refused_swap, tmp_path, source, stage):
        assert re.match(OTHER_RANK[stage], said)
        assert_same_bits(before, after)


def refused_swap(path: Path, source: Path, stage: int) -> tuple[str, State, State]:
    found: list[Any] = []

    class Trying(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if not found:
                found.append(gathered_by_deepspeed(trainer))
                with pytest.raises(LoRAError) as error:
                    load_adapter(module, source)
                found.extend([str(error.value), gathered_by_deepspeed(trainer)])

    model, callback = OfDeepSpeed(lora={"r": 2}).build(0)
    zero(path, callback, Trying(), stage=stage, max_epochs=1).fit(model, *data())
    before, said, after = found
    return said, before, after


def unfrozen_later(path: Path, stage: int) -> bool:
    class Unfreezing(Plain):
        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 1:
                self.net[2].weight.requires_grad_()

    torch.manual_seed(0)
    model = Unfreezing()
    before = model.net[2].weight.detach().clone()
    trainer = zero(path, LoRACallback(r=2, target_modules=TARGETS), stage=stage, max_epochs=2)
    with (
        pytest.warns(UserWarning, match=r"^lightning_lora: base parameters were unfrozen after injection"),
        pytest.warns(UserWarning, match=r"^lightning_lora: DeepSpeed trains what .* and 1 parameters were unfrozen"),
    ):
        trainer.fit(model, *data())
    return torch.equal(gathered_by_deepspeed(trainer)["net.2.weight"], before)


@pytest.mark.parametrize("stage", [2, 3])
def test_weight_that_is_unfrozen_during_the_fit_stays_and_a_warning_says_so(tmp_path, stage):
    assert world().run(unfrozen_later, tmp_path, stage) == [True, True]


def averaged(path: Path, stage: int) -> str:
    model, callback = OfDeepSpeed().build(0)
    with pytest.raises(LoRAError) as error:
        zero(path, callback, EMAWeightAveraging(), stage=stage, max_epochs=1).fit(model, *data())
    return str(error.value)


def test_average_of_slices_is_refused(tmp_path):
    for said in world().run(averaged, tmp_path, 3):
        assert re.match("LoRACallback: EMAWeightAveraging copies whole weights, and DeepSpeedStrategy at stage 3", said)
