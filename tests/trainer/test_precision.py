"""Every precision of the Trainer: wide factors, metrics of the unmerged run up to rounding, resuming."""

from __future__ import annotations

import logging
import sys
import types
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import TransformerEnginePrecision
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    attach,
    disable_adapter,
    inject,
    is_merged,
    load_from_checkpoint,
    take_adapter,
)
from support.covering import covering
from support.models.foreign import TELinear
from support.runs.lightning_versions import EMAWeightAveraging, weight_averaging
from support.runs.training import (
    BuiltInConfigureModel,
    Data,
    Net,
    assert_same_tensors,
    fit_model,
    make_trainer,
    weights,
)
from support.runs.with_callback import TARGETS, At, Watched, assert_as_found, base_weights
from support.runs.with_callback import lora_with_effect as small_lora

# Trainer precision: dtype of the base, dtype of the factors, relative tolerance of a merged loss against a factored one
PRECISIONS = {
    "32-true": (torch.float32, torch.float32, 1e-5),
    "bf16-mixed": (torch.float32, torch.float32, 4 * 2**-8),
    "bf16-true": (torch.bfloat16, torch.float32, 4 * 2**-8),
    "16-true": (torch.float16, torch.float32, 4 * 2**-11),
    "64-true": (torch.float64, torch.float64, 1e-12),
}
TRUE = ["bf16-true", "16-true"]


def lora(**options: Any) -> LoRACallback:
    """A larger adapter, whose effect stands out of 16-bit rounding."""
    return small_lora(lora_alpha=16, **options)


class Stable(Watched):
    """Without BatchNorm, whose 16-bit statistics would hide the rest."""

    def build_body(self) -> None:
        super().build_body()
        self.body[1] = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()  # so that losses are not rounded too

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)  # AdamW's eps is 0 in float16


class StableInConfigureModel(Stable, BuiltInConfigureModel):
    pass


def fit(path: Path, model: Net, *callbacks: Any, precision: str, epochs: int = 3, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    return fit_model(path, model, *callbacks, keep, ckpt_path=resume, precision=precision, max_epochs=epochs)


@pytest.mark.parametrize(("make", "precision"), covering([Stable, StableInConfigureModel], PRECISIONS, meet=1))
def test_merged_and_factored_agree_up_to_the_rounding(tmp_path, precision: str, make: type[Net]):
    """The loss without the adapter is further from the merged one than the tolerance."""
    base, wide, tolerance = PRECISIONS[precision]
    models = {}
    for merged_eval in (True, False):
        models[merged_eval] = model = make()
        start: dict[str, torch.Tensor] = {}
        note = At("on_fit_start", lambda trainer, module, start=start: start.update(base_weights(module)))
        fit(tmp_path / str(merged_eval), model, lora(merged_eval=merged_eval), note, precision=precision)
        assert_as_found(model, start)
        assert {p.dtype for n, p in model.named_parameters() if "lora" not in n} == {base}
        assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {wide}
    merged, factored = models[True], models[False]
    assert_same_tensors(weights(merged), weights(factored))
    assert [(s, w) for s, w, _ in merged.seen] == [(s, w or s == "validation") for s, w, _ in factored.seen]
    losses = [[loss for *_, loss in model.seen] for model in (merged, factored)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    with disable_adapter(merged):
        make_trainer(tmp_path, precision=precision).validate(merged, Data(), verbose=False)
    assert abs(losses[0][-1] - merged.seen[-1][2]) > 2 * tolerance * losses[0][-1]


@pytest.mark.parametrize(
    ("inference_mode", "fn", "precision"), covering([True, False], ["validate", "test", "predict"], PRECISIONS, meet=1)
)
def test_evaluation_without_a_fit_agrees_merged_and_unmerged(tmp_path, precision: str, fn: str, inference_mode: bool):
    models = {}
    for merged_eval in (True, False):
        torch.manual_seed(0)
        models[merged_eval] = model = Stable()
        trainer = make_trainer(
            tmp_path, lora(merged_eval=merged_eval), precision=precision, inference_mode=inference_mode
        )
        getattr(trainer, fn)(model, Data())
        assert not is_merged(model)
    numbers = [[loss for *_, loss in model.seen] for model in (models[True], models[False])]
    assert all(was for _, was, _ in models[True].seen)
    assert numbers[0] == pytest.approx(numbers[1], rel=PRECISIONS[precision][2])


@pytest.mark.parametrize(("precision", "make"), [("bf16-true", StableInConfigureModel), ("16-true", Stable)])
def test_factors_stay_in_float32(tmp_path, precision: str, make: type[Net]):
    """As parameters, gradients, optimizer state and in each kind of checkpoint; they compute in the layer's dtype."""
    dtypes: dict[str, set[torch.dtype]] = {"grad": set(), "hidden": set(), "output": set()}

    def note_gradients(trainer: Any, module: Any) -> None:
        dtypes["grad"] |= {p.grad.dtype for n, p in module.named_parameters() if "lora" in n}

    def watch_outputs(trainer: Any, module: Any) -> None:
        module.head.register_forward_hook(lambda m, args, out: dtypes["output"].add(out.dtype))

    model = make()
    watches = [At("on_after_backward", note_gradients), At("on_train_start", watch_outputs)]
    trainer = fit(tmp_path, model, lora(), *watches, precision=precision)
    half = PRECISIONS[precision][0]
    assert dtypes == {"grad": {torch.float32}, "hidden": set(), "output": {half}}
    for state in trainer.optimizers[0].state.values():
        assert state["momentum_buffer"].dtype == torch.float32
    for kind in ("adapter", "merged", "full"):
        model = make()
        trainer = fit(tmp_path / kind, model, lora(save=kind), precision=precision, epochs=1)
        trainer.save_checkpoint(tmp_path / f"{kind}.ckpt")
        checkpoint = torch.load(tmp_path / f"{kind}.ckpt", weights_only=True)
        saved = checkpoint["lora"]["adapter"] if kind == "merged" else checkpoint["state_dict"]
        for name in (f"{layer}.{leaf}" for layer in TARGETS for leaf in ("lora_A", "lora_B")):
            assert saved[name].dtype == torch.float32
            assert torch.equal(saved[name], model.state_dict()[name])
        if kind != "adapter":
            assert checkpoint["state_dict"]["head.weight"].dtype == half
        if make is Stable:  # whose base the class builds in float32
            loaded = load_from_checkpoint(Stable, tmp_path / f"{kind}.ckpt")
            assert torch.equal(loaded.head.lora_B, model.head.lora_B)


@pytest.mark.parametrize("precision", TRUE)
def test_autocast_adapter_dtype_false_keeps_the_factors_in_16_bits(tmp_path, precision: str):
    model = Stable()
    trainer = fit(tmp_path, model, lora(autocast_adapter_dtype=False), precision=precision)
    half = PRECISIONS[precision][0]
    assert {p.dtype for p in model.parameters()} == {half}
    assert {s["momentum_buffer"].dtype for s in trainer.optimizers[0].state.values()} == {half}
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in saved.values()} == {half}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize(
    ("make", "kind", "precision"),
    covering([Stable, StableInConfigureModel], ["adapter", "merged", "full"], PRECISIONS, meet=1),
)
def test_resumed_run_with_averaging_equals_the_uninterrupted_one(tmp_path, precision: str, make: type[Net], kind: str):
    def differing(name: str, *callbacks: Any) -> list[str]:
        models = [make(), make()]
        for i, model in enumerate(models):
            path, resume = tmp_path / name / str(i), tmp_path / name / "0/epoch=1.ckpt" if i else None
            fit(path, model, *callbacks, precision=precision, epochs=4, resume=resume)
        whole, resumed = map(weights, models)
        return [n for n in whole if not torch.equal(whole[n], resumed[n])]

    alone, ours = differing("alone"), differing("ours", lora(save=kind))
    # Lightning loads a double into the float32 model, where the model is not built under the precision.
    assert bool(alone) is (precision == "64-true" and make is Stable)
    assert bool(ours) is bool(alone)


@weight_averaging
def test_moving_average_in_16_bits_agrees_merged_and_unmerged(tmp_path):
    """EMAWeightAveraging copies the model in setup, before the precision is applied to it."""
    results = {}
    for merged_eval in (True, False):
        model = Stable()
        trainer = fit(
            tmp_path / str(merged_eval),
            model,
            lora(merged_eval=merged_eval),
            EMAWeightAveraging(),
            precision="bf16-true",
        )
        results[merged_eval] = trainer.callback_metrics["val_loss"].item(), weights(model)
    assert_same_tensors(results[True][1], results[False][1])
    assert results[True][0] == pytest.approx(results[False][0], rel=PRECISIONS["bf16-true"][2])


def cost_of_rounding(model: nn.Module) -> float:
    """The error of W' in 16 bits over the adapter's norm, by hand in float64."""
    errors, deltas = [], []
    for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
        delta = layer.lora.spec.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        exact = layer.weight.detach().double() + delta
        errors.append((exact.to(layer.weight.dtype).double() - exact).flatten())
        deltas.append(delta.flatten())
    return float(torch.cat(errors).norm() / torch.cat(deltas).norm())


def break_off(trainer: L.Trainer, module: L.LightningModule) -> None:
    if trainer.current_epoch == 1:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("options", "callbacks", "times"),
    [
        ({}, [], 1),
        ({"merge_after_fit": True}, [], 1),
        ({"merged_eval": False}, [], 0),  # nothing is merged
        ({}, [At("on_train_epoch_end", break_off)], 1),
    ],
    ids=["merged evaluation", "merged for good", "factored evaluation", "broken off"],
)
def test_a_fit_logs_what_rounding_costs_once_at_its_first_merged_evaluation(
    tmp_path, options, callbacks, times, caplog
):
    """More than 5 % is no warning there: the adapter has just begun to grow."""
    costs: list[float] = []
    note = At("on_validation_start", lambda trainer, module: costs.append(cost_of_rounding(module)))
    with (
        caplog.at_level(logging.INFO, "lightning_lora"),
        warnings.catch_warnings(record=True) as caught,
        nullcontext() if not callbacks else pytest.raises(ZeroDivisionError),
    ):
        warnings.simplefilter("always")
        fit(tmp_path, Stable(), lora(init_lora_weights=True, **options), note, *callbacks, precision="bf16-true")
    assert not [each for each in caught if "rounding costs" in str(each.message)]
    said = [text.partition(": rounding costs ")[2] for text in caplog.messages if "rounding costs" in text]
    assert said == [f"{costs[0]:.1%} of the adapter's norm"][:times]
    assert costs[0] > 0.05


def test_an_evaluation_outside_of_a_fit_tells_what_rounding_costs_at_its_first_merge(tmp_path, caplog):
    trainer, model = make_trainer(tmp_path, lora(), precision="bf16-true"), Stable()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            trainer.validate(model, Data(), verbose=False)
    assert sum("rounding costs" in message for message in caplog.messages) == 1


# --- TransformerEnginePrecision, with a stand-in for the package ---


class TELayerNorm(nn.LayerNorm):
    """Stands in for transformer_engine.pytorch.LayerNorm."""


class OnCPU(TransformerEnginePrecision):
    """Lightning's plugin without the context of a GPU in 8 bits."""

    def forward_context(self) -> Any:
        return nullcontext()


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    package: Any = types.ModuleType("transformer_engine")
    package.pytorch = types.ModuleType("transformer_engine.pytorch")
    made: Any = type("Linear", (TELinear,), {"__module__": "transformer_engine.pytorch.module.linear"})
    package.pytorch.Linear, package.pytorch.LayerNorm = made, TELayerNorm
    for module in (package, package.pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(replace_layers: bool | None = None, weights_dtype: torch.dtype = torch.float32) -> OnCPU:
        plugin = object.__new__(OnCPU)
        plugin.replace_layers, plugin.weights_dtype = replace_layers, weights_dtype
        return plugin

    return make


class Wide(Net):
    """Transformer Engine takes two of its layers, whose sizes are multiples of 8 and 16, and leaves the other two."""

    def build_body(self) -> None:
        super().build_body()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
            self.head = nn.Linear(16, 3)

    def build_head(self) -> None:
        pass


class WideInConfigureModel(Wide, BuiltInConfigureModel):
    pass


FP8_TARGETS = ["body.2", "body.4", "head"]
ignore_unfit = pytest.mark.filterwarnings("ignore:Support for FP8 in the linear layers with this plugin")


def fp8_fit(path: Path, plugin: Any, model: Any, *callbacks: Any, ckpt_path: Any = None, epochs: int = 1) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(path, *callbacks, plugins=[plugin], max_epochs=epochs)
    trainer.fit(model, Data(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path / "last.ckpt")
    return model


@ignore_unfit
@pytest.mark.parametrize(("make", "dtype"), [(Wide, torch.bfloat16), (WideInConfigureModel, torch.float32)])
def test_transformer_engine_converts_layers_before_they_are_adapted(
    tmp_path, transformer_engine, make: Any, dtype: Any
):
    callback = LoRACallback(r=2, target_modules=FP8_TARGETS)
    model = fp8_fit(tmp_path / "half", transformer_engine(weights_dtype=dtype), make(), callback)
    kinds = [isinstance(layer, TELinear) for layer in (model.body[0], model.body[2], model.body[4], model.head)]
    assert kinds == [False, True, True, False]
    assert {model.body[2].weight.dtype, model.body[2].lora_A.dtype} == {dtype, torch.float32}
    assert all(layer.lora_B.abs().sum() > 0 for layer in (model.body[2], model.body[4], model.head))
    path = tmp_path / "half/last.ckpt"
    whole = fp8_fit(tmp_path / "whole", transformer_engine(weights_dtype=dtype), make(), callback, epochs=2)
    resumed = fp8_fit(
        tmp_path / "on", transformer_engine(weights_dtype=dtype), make(), callback, ckpt_path=path, epochs=2
    )
    assert_same_tensors(weights(resumed), weights(whole))
    trainer = make_trainer(tmp_path, LoRACallback(), plugins=[transformer_engine(weights_dtype=dtype)])
    trainer.test(fresh := make(), Data(), ckpt_path=path, verbose=False)
    assert_same_tensors(weights(fresh), weights(model))


@ignore_unfit
def test_a_model_that_was_injected_before_transformer_engine_converts_it_is_refused(tmp_path, transformer_engine):
    inject(model := Wide(), LoRAConfig(r=2, target_modules=FP8_TARGETS))
    with pytest.raises(LoRAError, match=r"'body\.2' in Wide\w* was adapted, but is now a transformer_engine.*Linear"):
        fp8_fit(tmp_path, transformer_engine(), model, LoRACallback())


@ignore_unfit
def test_attached_adapters_are_not_dropped_where_transformer_engine_converts_their_layers(tmp_path, transformer_engine):
    inject(source := Wide(), LoRAConfig(r=2, target_modules=["body.2"], init_lora_weights=False))
    attach(model := Wide(), take_adapter(source), name="other")
    with pytest.raises(LoRAError, match=r"'body\.2' in Wide\w* was adapted, but is now a transformer_engine.*Linear"):
        fp8_fit(tmp_path, transformer_engine(), model, LoRACallback(r=2, target_modules=["body.4"]))
