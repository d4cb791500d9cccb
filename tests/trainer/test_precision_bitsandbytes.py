"""Lightning's BitsandbytesPrecision, with its check for CUDA patched: it converts layers, and adapters survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import nn

from lightning_lora import LoRACallback, LoRAError, attach, attached, inject, take_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.model.adapted_model import Listing
from lightning_lora.private.torch import LEFT_OUT_OF_DDP
from lightning_lora.trainer.precision import leave_out_of_ddp_
from support.models.quantized import PlainNet, batches, factors, inputs, network, packed_bits, quantize_
from support.runs.training import make_trainer

pytest.importorskip("bitsandbytes")
MODES = ["nf4-dq", "fp4"]


class BuiltLate(PlainNet):
    """Builds its last layers in setup."""

    def build(self, kind: str) -> Any:
        return network()[:2]

    def setup(self, stage: str) -> None:
        if len(self.network) == 2:
            self.network.extend(network()[2:])


@pytest.fixture
def precision(monkeypatch) -> Any:
    """Makes the plugin for a mode, and lets a Trainer on the CPU take it."""
    monkeypatch.setattr(accelerator_connector, "CUDAAccelerator", L.pytorch.accelerators.CPUAccelerator)

    def make(mode: str, **options: Any) -> BitsandbytesPrecision:
        return BitsandbytesPrecision(mode, dtype=torch.float32, **options)

    return make


def fitted(path: Path, plugin: Any, callback: LoRACallback, model: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = model or PlainNet()
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(path, callback, plugins=[plugin], **{"max_epochs": 1} | options)
    trainer.fit(model, batches(), batches(2), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path / "last.ckpt")
    return model


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "lora_alpha": 4} | options)


@pytest.mark.parametrize("mode", MODES)
def test_layers_are_quantized_and_adapters_survive_and_train(tmp_path, precision, mode):
    model = fitted(tmp_path, precision(mode), lora())
    assert [layer.weight.dtype for layer in model.network if isinstance(layer, nn.Linear)] == [torch.uint8] * 3
    assert [layer.quantized() for layer in (model.network[0], model.network[4])] == [mode[:3]] * 2
    assert len(factors(model)) == 6
    assert all(value.norm() > 0 for value in factors(model).values())
    x = inputs().requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad.norm() > 0


def test_a_run_resumes_before_its_weights_are_quantized(tmp_path, precision):
    """Lightning restores a checkpoint before the strategy moves the model, which quantizes it."""
    options = {"save": "merged", "dequantize": "float32"}
    whole = fitted(tmp_path / "whole", precision("nf4-dq"), lora(**options), max_epochs=2)
    fitted(tmp_path / "half", precision("nf4-dq"), lora(**options))
    resumed = fitted(
        tmp_path / "on", precision("nf4-dq"), lora(**options), max_epochs=2, ckpt_path=tmp_path / "half/last.ckpt"
    )
    assert packed_bits(resumed) == packed_bits(whole)
    assert all(torch.equal(value, factors(whole)[name]) for name, value in factors(resumed).items())


def test_a_checkpoint_is_loaded_onto_a_model_that_is_quantized_by_now(tmp_path, precision):
    model = fitted(tmp_path, precision("nf4"), lora())
    before = factors(model), packed_bits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    trainer = make_trainer(tmp_path, lora(), plugins=[precision("nf4")])
    trainer.test(model, batches(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert all(torch.equal(value, before[0][name]) for name, value in factors(model).items())
    assert packed_bits(model) == before[1]


def test_a_head_that_is_trained_whole_is_refused_until_the_plugin_ignores_it(tmp_path, precision):
    callback = lora(modules_to_save=["4"])
    with pytest.raises(LoRAError, match=r"ignore_modules=\{'network.4'\}"):
        fitted(tmp_path, precision("nf4"), callback)
    model = fitted(tmp_path, precision("nf4", ignore_modules={"network.4"}), callback)
    assert not torch.equal(model.network[4].weight, PlainNet().network[4].weight)


@pytest.mark.parametrize("ignored", [set(), {"network.4"}])
def test_layers_that_setup_builds_are_converted_before_they_are_adapted(tmp_path, precision, ignored):
    model = fitted(tmp_path, precision("nf4", ignore_modules=ignored), lora(), BuiltLate())
    found = [layer.weight.dtype for layer in (model.network[0], model.network[2], model.network[4])]
    assert found == [torch.uint8, torch.uint8, torch.float32 if ignored else torch.uint8]
    assert len(factors(model)) == 6


def test_a_model_that_was_injected_before_and_is_converted_is_refused(tmp_path, precision):
    model = PlainNet()
    inject(model, LoRAConfig(r=2))
    with pytest.raises(LoRAError, match=r"'network\.0' was adapted by inject, and BitsandbytesPrecision replaces it"):
        fitted(tmp_path, precision("nf4"), LoRACallback(), model)
    assert model.seen == []


def test_a_model_that_the_plugin_converted_before_it_was_injected_is_fitted(tmp_path, precision):
    model, plugin = PlainNet(), precision("nf4")
    plugin.convert_module(model)
    inject(model, LoRAConfig(r=2))
    fitted(tmp_path, plugin, LoRACallback(), model)
    assert model.network[0].quantized() == "nf4"
    assert all(value.norm() > 0 for value in factors(model).values())


def test_what_a_user_left_out_of_ddp_stays_left_out():
    pytest.importorskip("torchao")
    model = quantize_(network(), "Int8WeightOnlyConfig")
    setattr(model, LEFT_OUT_OF_DDP, ["mine", "0.weight"])
    for _ in range(2):
        leave_out_of_ddp_(Listing(model))
    assert getattr(model, LEFT_OUT_OF_DDP) == ["mine", "0.weight", "2.weight", "4.weight"]


@pytest.mark.parametrize("also_injected", [False, True])
def test_a_model_with_attached_adapters_that_is_converted_is_refused(tmp_path, precision, also_injected):
    inject(source := PlainNet(), LoRAConfig(r=2, init_lora_weights=False))
    attach(model := PlainNet(), take_adapter(source), name="other")
    if also_injected:
        inject(model, LoRAConfig(target_modules=[], modules_to_save=["network.4"]))
    with pytest.raises(LoRAError, match=r"'network\.0' has attached adapters, and BitsandbytesPrecision.*attach="):
        fitted(tmp_path, precision("nf4"), LoRACallback() if also_injected else lora(), model)
    assert model.seen == []
    assert attached(model) == {"other": 1}
