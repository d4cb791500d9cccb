"""Adapters of runs on bases of quantize_base: load_from_checkpoint quantises, and other calls say what to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    inject,
    load_adapter,
    load_from_checkpoint,
    quantize_base,
    save_adapter,
    take_adapter,
    unload,
)
from support.quantised import PlainNet, batches, inputs, network, packed_bits
from support.training import make_trainer

pytest.importorskip("torchao.quantization")


class Net(PlainNet):
    """Has its last layer as `head`."""

    def build(self, kind: str) -> Any:
        body, self.head = network()[:4], network()[4]
        return body

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.network(x))


class BuiltLate(Net):
    """Builds its layers in configure_model."""

    def build(self, kind: str) -> Any:
        return nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.network, nn.Identity):
            self.network = super().build("")


class SelfQuantised(Net):
    """Quantises its own base."""

    def build(self, kind: str) -> Any:
        body = super().build(kind)
        quantize_base(body)
        return body


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "lora_alpha": 4, "seed": 1} | options)


def fitted(path: Path, callback: LoRACallback, model: Any = None) -> Any:
    trainer = make_trainer(path, callback, max_epochs=1)
    trainer.fit(model := Net() if model is None else model, batches(), batches(2))
    trainer.save_checkpoint(path / "adapter.ckpt")
    return model.eval()


QUANTISE = r"Quantise the base as in training before it is adapted, .* by quantize_base"


@pytest.mark.parametrize(
    ("save", "options"), [("adapter", {"exclude_modules": ["0"], "modules_to_save": ["head"]}), ("merged", {})]
)
def test_load_from_checkpoint_quantises_the_layers_that_the_callback_did(tmp_path, options, save):
    trained = fitted(tmp_path, lora(quantize="nf4", save=save, dequantize="float32", **options))
    loaded = load_from_checkpoint(Net, tmp_path / "adapter.ckpt").eval()
    assert packed_bits(loaded) == packed_bits(trained)
    assert torch.equal(loaded(inputs()), trained(inputs()))


@pytest.mark.parametrize("cls", [BuiltLate, SelfQuantised])
def test_load_from_checkpoint_quantises_what_the_class_builds_plain(tmp_path, cls):
    trained = fitted(tmp_path, lora(quantize="nf4", modules_to_save=["head"]))
    loaded = load_from_checkpoint(cls, tmp_path / "adapter.ckpt").eval()
    assert torch.equal(loaded(inputs()), trained(inputs()))


def test_load_from_checkpoint_quantises_the_layers_that_quantize_base_did(tmp_path):
    quantize_base(model := Net(), exclude_modules=["network.2", "head"])
    trained = fitted(tmp_path, lora(), model)
    loaded = load_from_checkpoint(Net, tmp_path / "adapter.ckpt").eval()
    assert packed_bits(loaded) == packed_bits(trained)
    assert torch.equal(loaded(inputs()), trained(inputs()))


@pytest.mark.parametrize(("kind", "injected"), [("checkpoint", False), ("folder", True), ("memory", False)])
def test_load_adapter_onto_a_plain_model_says_to_quantise_it_first(tmp_path, kind: str, injected: bool):
    quantize_base(model := Net(), exclude_modules=["network.2"])
    trained = fitted(tmp_path, lora(), model)
    save_adapter(trained, tmp_path / "folder")
    sources = {"checkpoint": tmp_path / "adapter.ckpt", "folder": tmp_path / "folder", "memory": take_adapter(trained)}
    plain = Net().eval()
    if injected:
        inject(plain, LoRAConfig(r=2, lora_alpha=4))
    with pytest.raises(LoRAError, match=QUANTISE) as error:
        load_adapter(plain, sources[kind])
    assert "('head.weight', 'network.0.weight')" in str(error.value)
    if injected:
        unload(plain)
    quantize_base(plain, exclude_modules=["network.2"])
    load_adapter(plain, sources[kind])
    assert torch.equal(plain(inputs()), trained(inputs()))


def test_load_adapter_onto_a_quantised_model_of_what_was_trained_plain_says_not_to_quantise_it(tmp_path):
    trained = fitted(tmp_path, lora(), Net())
    quantize_base(quantised := Net().eval(), exclude_modules=["network.2"])
    with pytest.raises(LoRAError, match="was not quantised, here it is quantised") as error:
        load_adapter(quantised, take_adapter(trained))
    assert "Load the base without quantising it, as in training." in str(error.value)
    assert "quantize_base" not in str(error.value)


def test_a_trainer_without_quantize_says_to_quantise_first(tmp_path):
    options: dict[str, Any] = {"modules_to_save": ["head"]}
    fitted(tmp_path, lora(quantize="nf4", **options))

    def run(callback: LoRACallback) -> None:
        trainer = make_trainer(tmp_path, callback, max_epochs=2)
        trainer.fit(Net(), batches(), batches(2), ckpt_path=tmp_path / "adapter.ckpt")

    with pytest.raises(LoRAError, match=QUANTISE):
        run(lora(**options))
    run(lora(quantize="nf4", **options))


def test_a_quantised_module_to_save_is_refused_with_the_option_of_quantize_base():
    quantize_base(model := Net())
    with pytest.raises(LoRAError, match=r"quantize_base\(model, modules_to_save=\['head', 'network.2'\]\)\."):
        inject(model, LoRAConfig(r=2, modules_to_save=["head", "2"]))
