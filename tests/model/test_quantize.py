"""quantize_base: the layers that it quantizes, loading and merging them, and the option of the callback."""

from __future__ import annotations

import sys
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
from lightning_lora.exchange.apply import quantize_as_trained_
from lightning_lora.model.adapted_model import Listing
from lightning_lora.nn.nf4 import group_size
from lightning_lora.nn.quantized import dequantize, quantized_as
from support.models.quantized import (
    NF4,
    PlainNet,
    adapted,
    batches,
    factors,
    inputs,
    network,
    packed_bits,
    quantize_,
    quantized,
)
from support.runs.training import fit_model, make_trainer

torchao = pytest.importorskip("torchao.quantization")


def kinds(model: nn.Module) -> dict[str, str]:
    """How each weight is quantized, of those that are."""
    found = {name: quantized_as(parameter) for name, parameter in model.named_parameters()}
    return {name: kind for name, kind in found.items() if kind}


def test_the_weights_are_those_of_torchao_itself():
    plain, model = network(), network()
    assert quantize_base(model) == ["0", "2", "4"]
    assert kinds(model) == {"0.weight": NF4, "2.weight": NF4, "4.weight": NF4}
    for position in (0, 2, 4):
        weight = plain[position].weight.detach()
        theirs = torchao.to_nf4(weight, 64, group_size(weight.numel() // 64))
        assert torch.equal(model[position].weight.get_original_weight(), theirs.get_original_weight())
        assert float((dequantize(model[position]) - weight).norm() / weight.norm()) < 0.1
        assert not model[position].weight.requires_grad
    assert quantized_as(nn.Parameter(torchao.to_nf4(torch.randn(128, 256)), requires_grad=False)) == NF4


class Layers(nn.Module):
    """Has a layer of each kind that is left out, and one that is not."""

    def __init__(self) -> None:
        super().__init__()

        class Doubling(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        self.table = nn.Embedding(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight
        self.attention = nn.MultiheadAttention(64, 4)
        self.subclass = Doubling(64, 64)
        self.odd = nn.Linear(3, 5)
        self.double = nn.Linear(64, 64).double()
        self.conv = nn.Conv1d(64, 64, 1)
        self.body = nn.Linear(64, 64)


def test_other_layers_stay_as_they_are(caplog):
    model = Layers()
    with caplog.at_level("INFO", "lightning_lora"):
        assert quantize_base(model) == ["body"]
    assert kinds(model) == {"body.weight": NF4}
    assert "quantize_base: odd, double not quantized: the number of weights is no multiple of 64" in caplog.text


@pytest.mark.parametrize("options", [{"exclude_modules": "4"}, {"modules_to_save": ["4"]}], ids=str)
def test_named_layers_are_left_out(options):
    model = network()
    assert quantize_base(model, "nf4", **options) == ["0", "2"]
    assert type(model[4].weight) is nn.Parameter


def test_the_output_head_of_a_transformers_model_is_left_out():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    model = transformers.LlamaForCausalLM(config)
    names = quantize_base(model)
    assert len(names) == 7
    assert "lm_head" not in names
    inject(model, LoRAConfig(r=2))
    model(torch.arange(6)[None]).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.lora_B.grad is not None


def on_meta() -> nn.Module:
    return network().to("meta")


def not_finite() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[2].weight[3, 5] = torch.nan
    return model


def injected() -> nn.Module:
    inject(model := network(), LoRAConfig(r=2))
    return model


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (network, {"kind": "int4"}, r"quantize_base: a base can be quantized as nf4, not as 'int4'"),
        (network, {"exclude_modules": ["7"]}, r"quantize_base: exclude_modules: '7' names no"),
        (network, {"exclude_modules": ["0", "2", "4"]}, r"quantize_base: Sequential has no layer to quantize"),
        (on_meta, {}, r"quantize_base: '0.weight' has no values yet \(it is on the meta device\)"),
        (not_finite, {}, r"quantize_base: a value of '2' is not finite"),
        (injected, {}, r"quantize_base: '0' is adapted already; call quantize_base before inject"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(build, options, message):
    with pytest.raises(LoRAError, match=message):
        quantize_base(build(), **options)


def test_without_torchao_the_error_names_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(LoRAError, match=r"quantize_base: expected torchao's NF4Tensor.*pip install torchao"):
        quantize_base(network())


def test_a_plain_state_dict_is_quantized_as_it_is_loaded():
    model, plain = quantized(NF4), network()
    for layer in (model[0], model[2]):
        layer.weight.copy_(torch.ones(layer.weight.shape))
    model.load_state_dict(plain.state_dict())
    assert packed_bits(model) == packed_bits(quantized(NF4))


# --- the option of the callback ---


def fitted(path: Path, callback: LoRACallback, model: Any, **options: Any) -> Any:
    fit_model(path, model, callback, data=(batches(), batches(2)), saved=path / "adapter.ckpt", max_epochs=1, **options)
    return model.eval()


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "lora_alpha": 4, "seed": 1} | options)


class QuantizedBefore(PlainNet):
    def build(self, kind: str) -> Any:
        return quantized(NF4)


class LastLayersLate(PlainNet):
    """Builds its last layers in configure_model."""

    def build(self, kind: str) -> Any:
        return network()[:2]

    def configure_model(self) -> None:
        if len(self.network) == 2:
            self.network.extend(network()[2:])


def test_the_option_trains_what_quantize_base_and_inject_do(tmp_path):
    expected = fitted(tmp_path / "by hand", lora(), QuantizedBefore())
    found = fitted(tmp_path / "option", lora(quantize="nf4"), LastLayersLate())
    assert packed_bits(found) == packed_bits(expected)
    assert factors(found).keys() == factors(expected).keys()
    assert all(torch.equal(value, factors(expected)[name]) for name, value in factors(found).items())
    again = PlainNet()
    make_trainer(tmp_path, lora(quantize="nf4")).test(again, batches(2), ckpt_path=tmp_path / "option/adapter.ckpt")
    assert kinds(again) == kinds(found)


def test_the_option_on_a_model_that_was_injected_plain_is_refused(tmp_path):
    model = PlainNet()
    inject(model, LoRAConfig(r=2, lora_alpha=4), seed=1)
    with pytest.raises(LoRAError, match=r"quantize is 'nf4', but no weight of PlainNet is quantized.*quantize_base"):
        fitted(tmp_path, lora(quantize="nf4"), model)
    with pytest.raises(LoRAError, match=r"LoRACallback: a base can be quantized as nf4, not as 'nf3'"):
        lora(quantize="nf3")


def test_a_run_in_16_bits_keeps_the_base_quantized_but_for_what_is_trained_whole(tmp_path):
    callback = lora(quantize="nf4", modules_to_save=["4"])
    model = fitted(tmp_path, callback, PlainNet(), precision="bf16-true")
    assert kinds(model) == {f"network.{i}.weight": NF4 for i in (0, 2)}
    assert model.network[4].weight.requires_grad
    assert all(float(value.norm()) > 0 for value in factors(model).values())


# --- loading ---


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


class SelfQuantized(Net):
    """Quantizes its own base."""

    def build(self, kind: str) -> Any:
        body = super().build(kind)
        quantize_base(body)
        return body


QUANTIZE = r"Quantize the base as in training before it is adapted, .* by quantize_base"


@pytest.mark.parametrize(
    ("save", "options"), [("adapter", {"exclude_modules": ["0"], "modules_to_save": ["head"]}), ("merged", {})]
)
def test_load_from_checkpoint_quantizes_the_layers_that_the_callback_did(tmp_path, options, save):
    trained = fitted(tmp_path, lora(quantize="nf4", save=save, dequantize="float32", **options), Net())
    loaded = load_from_checkpoint(Net, tmp_path / "adapter.ckpt").eval()
    assert packed_bits(loaded) == packed_bits(trained)
    assert torch.equal(loaded(inputs()), trained(inputs()))


@pytest.mark.parametrize("cls", [BuiltLate, SelfQuantized])
def test_load_from_checkpoint_quantizes_what_the_class_builds_plain(tmp_path, cls):
    trained = fitted(tmp_path, lora(quantize="nf4", modules_to_save=["head"]), Net())
    loaded = load_from_checkpoint(cls, tmp_path / "adapter.ckpt").eval()
    assert torch.equal(loaded(inputs()), trained(inputs()))


def test_load_from_checkpoint_quantizes_the_layers_that_quantize_base_did(tmp_path):
    quantize_base(model := Net(), exclude_modules=["network.2", "head"])
    trained = fitted(tmp_path, lora(), model)
    loaded = load_from_checkpoint(Net, tmp_path / "adapter.ckpt").eval()
    assert packed_bits(loaded) == packed_bits(trained)
    assert torch.equal(loaded(inputs()), trained(inputs()))


def test_a_layer_of_another_quantization_stays_where_layers_are_quantized_as_in_training():
    adapter = take_adapter(adapted(NF4))
    model = network()
    quantize_(model[2], "Int8WeightOnlyConfig")
    quantize_as_trained_(Listing(model), adapter)
    assert kinds(model) == {"0.weight": NF4, "2.weight": "Int8Tensor", "4.weight": NF4}


@pytest.mark.parametrize(("kind", "injected"), [("checkpoint", False), ("folder", True), ("memory", False)])
def test_load_adapter_onto_a_plain_model_says_to_quantize_it_first(tmp_path, kind: str, injected: bool):
    quantize_base(model := Net(), exclude_modules=["network.2"])
    trained = fitted(tmp_path, lora(), model)
    save_adapter(trained, tmp_path / "folder")
    sources = {"checkpoint": tmp_path / "adapter.ckpt", "folder": tmp_path / "folder", "memory": take_adapter(trained)}
    plain = Net().eval()
    if injected:
        inject(plain, LoRAConfig(r=2, lora_alpha=4))
    with pytest.raises(LoRAError, match=QUANTIZE) as error:
        load_adapter(plain, sources[kind])
    assert "('head.weight', 'network.0.weight')" in str(error.value)
    if injected:
        unload(plain)
    quantize_base(plain, exclude_modules=["network.2"])
    load_adapter(plain, sources[kind])
    assert torch.equal(plain(inputs()), trained(inputs()))


def test_load_adapter_onto_a_quantized_model_of_what_was_trained_plain_says_not_to_quantize_it(tmp_path):
    trained = fitted(tmp_path, lora(), Net())
    quantize_base(quantized := Net().eval(), exclude_modules=["network.2"])
    with pytest.raises(LoRAError, match="was not quantized, here it is quantized") as error:
        load_adapter(quantized, take_adapter(trained))
    assert "Load the base without quantizing it, as in training." in str(error.value)
    assert "quantize_base" not in str(error.value)


def test_a_trainer_without_quantize_says_to_quantize_first(tmp_path):
    options: dict[str, Any] = {"modules_to_save": ["head"]}
    fitted(tmp_path, lora(quantize="nf4", **options), Net())

    def run(callback: LoRACallback) -> None:
        trainer = make_trainer(tmp_path, callback, max_epochs=2)
        trainer.fit(Net(), batches(), batches(2), ckpt_path=tmp_path / "adapter.ckpt")

    with pytest.raises(LoRAError, match=QUANTIZE):
        run(lora(**options))
    run(lora(quantize="nf4", **options))


def test_a_quantized_module_to_save_is_refused_with_the_option_of_quantize_base():
    quantize_base(model := Net())
    with pytest.raises(LoRAError, match=r"quantize_base\(model, modules_to_save=\['head', 'network.2'\]\)\."):
        inject(model, LoRAConfig(r=2, modules_to_save=["head", "2"]))
