"""Runs of models with quantized weights: evaluation, each kind of checkpoint, resuming, and what is refused."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging

from lightning_lora import LoRACallback, LoRAError, inject, load_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.model.adapted_model import Listing
from lightning_lora.model.state_dict import merge_state_dict
from support.covering import covering
from support.models.networks import same
from support.models.quantized import (
    NAMES,
    QUANTIZED,
    PlainNet,
    QuantizedNet,
    batches,
    factors,
    inputs,
    network,
    packed_bits,
    reference,
    run_reference,
)
from support.runs.lightning_versions import EMAWeightAveraging
from support.runs.training import fit_model, make_trainer

# A Trainer does the same for every kind. nn/test_quantized.py tests the layers of each.
KINDS = QUANTIZED if os.environ.get("LORA_FULL") else ["nf4 nested", "int8", "Int8WeightOnlyConfig"]
every_kind = pytest.mark.parametrize("kind", KINDS)
SAVES: dict[str, dict[str, Any]] = {
    "adapter": {"save": "adapter"},
    "merged": {"save": "merged", "dequantize": "float32"},
}


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "lora_alpha": 4} | options)


def fitted(path: Path, kind: str, *callbacks: Any, model: Any = None, **options: Any) -> QuantizedNet:
    torch.manual_seed(0)
    model = model or QuantizedNet(kind)
    ckpt_path = options.pop("ckpt_path", None)
    make_trainer(path, *callbacks, **options).fit(model.train(), batches(), batches(2), ckpt_path=ckpt_path)
    return model


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in found)


@every_kind
def test_validation_is_factored_and_changes_no_bit_of_base_or_adapter(tmp_path, kind, caplog):
    with caplog.at_level(logging.INFO, "lightning_lora"):
        model = fitted(tmp_path, kind, lora(), max_epochs=2)
    without = fitted(tmp_path, kind, lora(), max_epochs=2, limit_val_batches=0)
    assert_same(factors(model), factors(without))
    assert all(value.norm() > 0 for value in factors(model).values())
    assert packed_bits(model) == packed_bits(QuantizedNet(kind))
    assert {stage for stage, merged, _ in model.seen if merged} == {"validation"}
    assert len([each for each in caplog.records if "no layer can be merged" in each.getMessage()]) == 1
    first = [loss for stage, _, loss in model.seen if stage == "validation"][:3]
    unmerged = fitted(tmp_path, kind, lora(merged_eval=False), max_epochs=1)
    assert first == [loss for stage, _, loss in unmerged.seen if stage == "validation"][:3]


@pytest.mark.slow
@pytest.mark.parametrize(("save", "kind"), covering([*SAVES], KINDS, meet=1))
def test_resuming_equals_the_uninterrupted_run(tmp_path, kind, save):
    whole = fitted(tmp_path / "whole", kind, lora(), max_epochs=3)
    saving = ModelCheckpoint(tmp_path / "half", filename="{epoch}", save_top_k=-1)
    fitted(tmp_path / "half", kind, lora(**SAVES[save]), saving, max_epochs=1)
    callbacks = lora(**SAVES[save]), ModelCheckpoint(tmp_path / "half", filename="{epoch}", save_top_k=-1)
    resumed = fitted(tmp_path / "on", kind, *callbacks, max_epochs=3, ckpt_path=tmp_path / "half/epoch=0.ckpt")
    assert_same(factors(resumed), factors(whole))
    assert packed_bits(resumed) == packed_bits(whole)
    if save == "adapter":
        assert (
            torch.load(tmp_path / "half/epoch=0.ckpt", weights_only=True)["state_dict"].keys() == factors(whole).keys()
        )


@every_kind
def test_merged_checkpoints_are_plain_and_rounded_once(tmp_path, kind):
    trainer = make_trainer(tmp_path, lora(save="merged", dequantize=torch.bfloat16), max_epochs=1)
    model = QuantizedNet(kind)
    trainer.fit(model, batches(), batches(2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for name, value in state.items() if name.endswith("weight")} == {torch.bfloat16}
    plain = PlainNet()
    plain.load_state_dict({name: value.float() for name, value in state.items()})
    exact = reference(model.network)
    for position in (0, 2, 4):
        layer = exact[position]
        expected = (layer.weight + 2.0 * layer.B @ layer.A).to(torch.bfloat16)
        assert same(state[f"network.{position}.weight"], expected.detach())
    with torch.no_grad():
        difference = plain(inputs()) - run_reference(exact, inputs().double())
    assert float(difference.norm() / plain(inputs()).detach().norm()) < 1e-2


@pytest.mark.parametrize(("dtype", "kind"), covering(["bfloat16", "float32"], KINDS, meet=1))
def test_merged_checkpoints_tell_what_rounding_costs_once_of_the_first_one(tmp_path, kind, dtype, caplog):
    costs: list[float] = []

    def cost(model: Any) -> float:
        error = change = 0.0
        for position in (0, 2, 4):
            layer = reference(model.network)[position]
            delta = (2.0 * layer.B @ layer.A).detach()
            merged = (layer.weight + delta).to(getattr(torch, dtype)).double()
            error += float((merged - layer.weight - delta).norm() ** 2)
            change += float(delta.norm() ** 2)
        return (error / change) ** 0.5

    class Keep(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            costs.append(cost(pl_module))
            super().on_train_epoch_end(trainer, pl_module)

    saves = Keep(tmp_path, filename="{epoch}", save_top_k=-1)
    with caplog.at_level(logging.INFO, "lightning_lora"):
        fitted(tmp_path, kind, lora(save="merged", dequantize=dtype), saves, max_epochs=2)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    lines = [message.partition("costs ")[2] for message in caplog.messages if "rounding costs" in message]
    assert lines == ([f"{costs[0]:.1%} of the adapter's norm"] if dtype == "bfloat16" else [])


@every_kind
@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("merged", r"'network.0' is quantized \({name}\).*dequantize=\"bfloat16\""),
        ("full", r"save='full' would save the quantized weight of 'network.0'.* save='adapter'"),
    ],
)
def test_checkpoints_that_cannot_be_saved_are_refused_before_the_first_batch(tmp_path, kind, save, message):
    model = QuantizedNet(kind)
    with pytest.raises(LoRAError, match=message.replace("{name}", NAMES[kind])):
        make_trainer(tmp_path, lora(save=save)).fit(model, batches(), batches(2))
    assert model.seen == []


@every_kind
def test_merge_after_fit_leaves_plain_layers(tmp_path, kind):
    model = fitted(tmp_path, kind, lora(merge_after_fit=True, dequantize="float32"), max_epochs=1)
    twin = fitted(tmp_path, kind, lora(), max_epochs=1)
    assert [type(layer) for layer in model.network] == [type(layer) for layer in network()]
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    with torch.no_grad():
        exact = run_reference(reference(twin.network), inputs().double())
        torch.testing.assert_close(model(inputs()).double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoRAError, match="is quantized"):
        fitted(tmp_path, kind, lora(merge_after_fit=True), max_epochs=1)


@pytest.mark.parametrize(("trained", "here"), [("nf4", None), (None, "nf4"), ("nf4", "fp4")])
def test_an_adapter_of_another_quantization_is_refused_with_the_reason(tmp_path, trained, here):
    source = PlainNet() if trained is None else QuantizedNet(trained)
    fit_model(tmp_path, source, lora(), data=(batches(), batches(2)), saved=tmp_path / "one.ckpt", max_epochs=1)
    model = PlainNet() if here is None else QuantizedNet(here)
    was, is_now = (f"quantized \\({kind}\\)" if kind else "not quantized" for kind in (trained, here))
    with pytest.raises(LoRAError, match=rf"the base was {was}, here it is {is_now}.*strict_base=False"):
        load_adapter(model, tmp_path / "one.ckpt")
    with pytest.warns(UserWarning, match=f"the base was {was}, here it is {is_now}"):
        load_adapter(model, tmp_path / "one.ckpt", strict_base=False)
    assert_same(factors(model), factors(source))


def test_an_adapter_fits_a_base_that_was_packed_for_evaluation_first(tmp_path):
    trainer = make_trainer(tmp_path, lora(), max_epochs=1)
    trainer.fit(QuantizedNet("nf4 nested"), batches(), batches(2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model = QuantizedNet("nf4 nested").eval()
    with torch.no_grad():
        model(inputs())
    packs = getattr(model.network[0].weight.quant_state, "packing_format_for_cpu", False)
    with pytest.warns(match="evaluated without an adapter") if packs else contextlib.nullcontext():
        load_adapter(model, tmp_path / "one.ckpt")
    assert all(value.norm() > 0 for value in factors(model).values())


@pytest.mark.weight_averaging
@pytest.mark.parametrize("kind", ["nf4", "Int8WeightOnlyConfig"])
def test_averaging_of_weights_which_would_change_quantized_bytes_is_refused(tmp_path, kind):
    model = QuantizedNet(kind)
    for average in (EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.01)):
        expected = rf"'network\.0' is quantized .*{type(average).__name__} averages frozen weights"
        with pytest.raises(LoRAError, match=expected):
            make_trainer(tmp_path, lora(), average).fit(model, batches(), batches(2))
    assert model.seen == []
    assert packed_bits(model) == packed_bits(QuantizedNet(kind))


def test_merged_weights_come_from_the_factors_in_the_state_dict_that_is_saved():
    """A module's own state_dict, or a callback's, may hold other values than the live ones."""
    model = QuantizedNet("nf4")
    inject(model, LoRAConfig(r=2, lora_alpha=4, init_lora_weights=False))
    state = model.state_dict()
    state |= {name: value * 2 for name, value in state.items() if name.endswith("lora_B")}
    found = merge_state_dict(Listing(model), state, torch.float64)
    layer = reference(model.network)[2]
    torch.testing.assert_close(found["network.2.weight"], (layer.weight + 4 * layer.B @ layer.A).detach())


@pytest.mark.parametrize("kind", ["nf4", "nf4 in bfloat16"])
def test_a_cast_of_the_model_to_the_dtype_of_packed_values_leaves_them(tmp_path, kind):
    model = QuantizedNet(kind)
    make_trainer(tmp_path, lora(), max_epochs=1, precision="bf16-true").fit(model, batches(), batches(2))
    assert packed_bits(model)[0] == packed_bits(QuantizedNet(kind))[0]
