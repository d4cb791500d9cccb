"""Layers, weights and tensors for which the callback one writes first is wrong, and ours is right."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRACallback
from lightning_lora.nn.lora_layer import LoRALayer
from support.naive import (
    OPTIONS,
    RANDOM,
    Damage,
    FiltersInAClosure,
    InjectsWhenItMerges,
    Make,
    MergesEachName,
    NaiveCallback,
    PatchesForward,
    Peft,
    ReplacesData,
    assert_harms_naive_alone,
    fails,
    fit,
)
from support.runs import At
from support.training import Data, Net, inputs, make_trainer, outputs, weights

# --- weights that are not the layer's alone ---


class Tied(Net):
    """Tokens in, tokens out, with one matrix."""

    def build_body(self) -> None:
        self.embed = nn.Embedding(3, 8)

    def build_head(self) -> None:
        self.head = nn.Linear(8, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x.abs().round().long().clamp(max=2)[:, 0]))


class Registered(Net):
    """One layer under two names."""

    def build_head(self) -> None:
        super().build_head()
        self.again = self.head


def merged_against_factored(make: Make, path: Path, model: type[Net], targets: list[str]) -> float:
    found = []
    for merged_eval in (True, False):
        torch.manual_seed(0)
        callback = make(**OPTIONS | RANDOM | {"target_modules": targets}, merged_eval=merged_eval)
        found.append(fit(path, model(), callback).callback_metrics["val_loss"].item())
    return abs(found[0] - found[1])


def tied_head(make: Make, path: Path) -> float:
    return merged_against_factored(make, path, Tied, ["head"])


def registered_twice(make: Make, path: Path) -> float:
    return merged_against_factored(make, path, Registered, ["head"])


# --- layers that torch reads instead of calling ---


class Encoder(Net):
    """torch's own encoder layer, and a reference that computes in full what it should."""

    def build_body(self) -> None:
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)[None])[0])


def effective(layer: nn.Module) -> torch.Tensor:
    """W + s * B @ A of a layer of ours or PEFT's."""
    if isinstance(layer, LoRALayer):
        return layer.weight + layer.lora.spec.scaling * layer.lora_B @ layer.lora_A
    return layer.get_base_layer().weight + layer.get_delta_weight("default")


def read_layers(make: Make, path: Path, targets: list[str]) -> float:
    """Validation's output against that of a plain model with W'."""
    model, found = Encoder(), {}
    note = At("on_validation_batch_end", lambda trainer, module: found.update(out=module(inputs())))
    callback = make(**OPTIONS | RANDOM | {"target_modules": targets}, merged_eval=False)
    make_trainer(path, callback, note).validate(model, Data(), verbose=False)
    plain = Encoder()
    with torch.no_grad():
        for name in targets:
            layer = plain.get_submodule(f"layer.{name}")
            layer.weight.copy_(effective(model.get_submodule(f"layer.{name}")))
    return (outputs(plain) - found["out"]).abs().max().item()


def encoder_layer_fast_path(make: Make, path: Path) -> float:
    return read_layers(make, path, ["linear1", "linear2"])


def attention_out_proj(make: Make, path: Path) -> float:
    return read_layers(make, path, ["self_attn.out_proj"])


def attention_out_proj_is_trained(make: Make, path: Path) -> float:
    model = Encoder()
    with suppress(RuntimeError):  # nothing that is trained has an effect
        fit(path, model, make(**OPTIONS | {"target_modules": ["self_attn.out_proj"]}))
    trained = [p for name, p in model.named_parameters() if "out_proj" in name and "lora_B" in name]
    return float(not trained[0].any())


# --- torch.compile ---


class Compiled(Net):
    def build_body(self) -> None:
        super().build_body()
        self.body = torch.compile(self.body, backend="eager")


def compiled_submodule_is_named(make: Make, path: Path) -> float:
    """Its wrapper puts a segment into the names that targets are compared with."""

    def run() -> None:
        with torch.compiler.set_stance("force_eager"):
            make_trainer(path, make(**OPTIONS | {"target_modules": ["body.0"]})).validate(Compiled(), Data())

    return fails(run, ValueError)


# --- tensors ---


def evaluation_before_a_fit(make: Make, path: Path) -> float:
    """A tensor made in inference mode cannot be trained with."""
    model, callback = Net(), make(**OPTIONS)
    make_trainer(path, callback).validate(model, Data(), verbose=False)
    return fails(lambda: fit(path, model.train(), callback), RuntimeError)


def injected_in_an_evaluation(make: Make, path: Path) -> float:
    """As is a parameter that is made there."""
    model = Net()
    make_trainer(path, make(**OPTIONS | RANDOM)).validate(model, Data(), verbose=False)
    return fails(lambda: fit(path, model.train()), RuntimeError)


def deepcopy_of_a_patched_module(make: Make, path: Path) -> float:
    """What its copy saves must be the copy's."""
    model = Net()
    fit(path, model, make(**OPTIONS))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.lora_B.add_(1)
    trainer = make_trainer(path)
    trainer.strategy._lightning_module = twin
    trainer.save_checkpoint(path / "twin.ckpt")
    saved = torch.load(path / "twin.ckpt", weights_only=True)["state_dict"]["head.lora_B"]
    return (saved - twin.head.lora_B).abs().max().item()


def pickle_of_a_patched_module(make: Make, path: Path) -> float:
    model = Net()
    fit(path, model, make(**OPTIONS))
    model.trainer = None
    return fails(lambda: pickle.dumps(model), AttributeError, pickle.PicklingError)


def deepcopy_of_an_adapted_model(make: Make, path: Path) -> float:
    """What is changed in the copy must act in the copy."""
    model = Net()
    make_trainer(path, make(**OPTIONS | RANDOM)).validate(model, Data(), verbose=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.head.parameters():
            parameter.mul_(2)
    hidden = twin.eval().body(inputs())
    scaling = twin.head.lora.spec.scaling if hasattr(twin.head, "lora") else 1.0
    weight = twin.head.weight + scaling * twin.head.lora_B @ twin.head.lora_A
    return (twin.head(hidden) - F.linear(hidden, weight, twin.head.bias)).abs().max().item()


def bf16_true_casts_the_factors(make: Make, path: Path) -> float:
    """The share of A that a small step leaves where it was."""

    class Slow(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    first: dict[str, torch.Tensor] = {}
    model = Slow()
    note = At("on_train_start", lambda trainer, module: first.update(weights(module)))
    fit(path, model, make(**OPTIONS | RANDOM), note, precision="bf16-true")
    same = [(model.state_dict()[name] == value).float().mean() for name, value in first.items() if "lora_A" in name]
    return max(0.0, torch.stack(same).mean().item() - 0.1)


def narrow(**options: Any) -> L.Callback:
    return NaiveCallback(autocast_adapter_dtype=False, **options)


CASES: list[tuple[Damage, Make, Make]] = [
    (tied_head, NaiveCallback, LoRACallback),
    (registered_twice, MergesEachName, LoRACallback),
    (encoder_layer_fast_path, Peft, LoRACallback),
    (attention_out_proj, Peft, LoRACallback),
    (attention_out_proj_is_trained, Peft, LoRACallback),
    (compiled_submodule_is_named, Peft, LoRACallback),
    (evaluation_before_a_fit, ReplacesData, LoRACallback),
    (injected_in_an_evaluation, InjectsWhenItMerges, LoRACallback),
    (deepcopy_of_a_patched_module, FiltersInAClosure, LoRACallback),
    (pickle_of_a_patched_module, FiltersInAClosure, LoRACallback),
    (deepcopy_of_an_adapted_model, PatchesForward, LoRACallback),
    (bf16_true_casts_the_factors, narrow, LoRACallback),
]


@pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights")
@pytest.mark.parametrize(("damage", "naive", "ours"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_model_harms_the_naive_callback_and_not_ours(tmp_path, damage: Damage, naive: Make, ours: Make):
    assert_harms_naive_alone(damage, naive, ours, tmp_path)
