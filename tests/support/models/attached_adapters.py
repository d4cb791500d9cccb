"""What is checked where a variant is trained beside two attached adapters of other ranks, against pairs.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    attach,
    attached,
    detach,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merged_state_dict,
    scaled,
    set_strength,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.adapter.adapter import Adapter
from support.models.pair_checks import STEPS, TOLERANCE, assert_as_defined, assert_merges, assert_same, loose
from support.models.pairs import (
    Naive,
    Tensors,
    Variant,
    all_bits,
    assert_near,
    batch,
    fill_,
    filled,
    fresh,
    naive_optimizer,
    naive_train_,
    optimizer_for,
    train_,
    wide,
)

WEIGHTS = {"first": 0.7, "second": -1.5}
OPTIONS: dict[str, Any] = {
    "first": {"r": 3, "lora_alpha": 4, "target_modules": ["inner", "other"]},
    "second": {"r": 1, "lora_alpha": 0.5, "target_modules": ["inner"], "target_parameters": ["stack.weights"]},
}


class NaiveBeside(Naive):
    """Two plain adapters are added to every weight, whatever a variant makes of it."""

    def __init__(self, variant: Variant, dtype: torch.dtype, others: dict[str, Adapter]) -> None:
        super().__init__(variant, dtype)
        self.others, self.beside = others, dict(WEIGHTS)

    def weights(self, values: Tensors) -> Tensors:
        whole = super().weights(values)
        for name, other in self.others.items():
            for layer, (a, b) in pairs_in(other).items():
                weight = layer if layer in whole else f"{layer}.weight"
                s = OPTIONS[name]["lora_alpha"] / OPTIONS[name]["r"]
                whole[weight] = whole[weight] + self.beside[name] * s * (b @ a).cpu()
        return whole


def pairs_in(other: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for layer in ("inner", "other"):
        if f"{layer}.lora_A" in other.tensors:
            found[layer] = (other.tensors[f"{layer}.lora_A"].double(), other.tensors[f"{layer}.lora_B"].double())
    if "stack.lora_A_weights" in other.tensors:
        a, b = (other.tensors[f"stack.lora_{leaf}_weights"].double() for leaf in "AB")
        found["stack.weights"] = (a.view(2, -1, a.shape[1]), b.view(2, -1, b.shape[1]))
    return found


def others(variant: Variant, dtype: torch.dtype) -> dict[str, Adapter]:
    """Return two adapters that were trained on the same base."""
    found = {}
    for seed, (name, options) in enumerate(OPTIONS.items()):
        model = fresh(variant, dtype)
        inject(model, LoRAConfig(**options), seed=seed)
        found[name] = take_adapter(fill_(model, seed=20 + seed))
    return found


def attach_(model: nn.Module, those: dict[str, Adapter]) -> nn.Module:
    for name in reversed(those):  # in another order than that of names
        layers = attach(model, those[name], name=name, strength=WEIGHTS[name])
        assert layers == sorted(pairs_in(those[name]), key=["stack.weights", "inner", "other"].index)
    return model


def beside(dtype: torch.dtype) -> Callable[[Variant], None]:
    def check(variant: Variant) -> None:
        """Outputs, gradients, W', every strength, and what a model is again without them."""
        model, alone, those = filled(variant, dtype), filled(variant, dtype), others(variant, dtype)
        attach_(model, those)
        assert attached(model) == WEIGHTS
        naive, tolerance = NaiveBeside(variant, dtype, those), loose(variant, TOLERANCE[dtype])
        assert_as_defined(model, naive, tolerance)
        with torch.no_grad():
            assert_near(model(batch(3)[0]), naive.run(wide(model), batch(3)[0]), tolerance, "without gradients")
        assert_merges(model, naive, tolerance)
        for name in WEIGHTS:
            set_strength(model, 0.3, name)
            naive.beside[name] = 0.3
        assert_as_defined(model, naive, tolerance)
        set_strength(model, WEIGHTS)
        naive.beside = dict(WEIGHTS)
        assert_as_defined(model, naive, tolerance)
        with scaled(model, 0.0):
            own, naive.variant = naive.variant, Variant("nothing", adapted=(), quantized=variant.quantized)
            options, naive.options = naive.options, {}
            assert_near(model(batch(3)[0]), naive.run({}, batch(3)[0]), tolerance, "the trained one off")
            naive.variant, naive.options = own, options
        with disable_adapter(model):
            assert torch.equal(model(batch(3)[0]), fresh(variant, dtype)(batch(3)[0]))
        assert_as_defined(model, naive, tolerance)
        for name in WEIGHTS:
            detach(model, name)
        assert_same(model, alone)
        assert {type(module) for module in model.modules()} == {type(module) for module in alone.modules()}

    return check


def trained_with(variant: Variant) -> None:
    """Steps beside them are those of the definition, and no tensor of theirs moves; a swap and an unload leave them."""
    model, those = filled(variant), others(variant, torch.float32)
    attach_(model, those)
    naive, values = NaiveBeside(variant, torch.float32, those), wide(model)
    optimizer, reference = optimizer_for(variant, model), naive_optimizer(naive, values)
    packed = copy.deepcopy(model.inner.lora.attached)
    train_(model, optimizer, STEPS)
    naive_train_(naive, values, reference, STEPS)
    for name, expected in values.items():
        assert_near(model.get_parameter(name), expected, 1e-3, name)
    assert torch.equal(packed.a, model.inner.lora.attached.a)
    assert torch.equal(packed.b, model.inner.lora.attached.b)
    earlier = take_adapter(model)
    load_adapter(model, take_adapter(filled(variant, draw=9)))
    load_adapter(model, earlier)
    assert_as_defined(model, naive, loose(variant, 1e-3))
    unload(model)
    assert attached(model) == WEIGHTS
    naive.variant, naive.options = Variant("nothing", adapted=(), quantized=variant.quantized), {}
    assert_near(model(batch(3)[0]), naive.run({}, batch(3)[0]), loose(variant, 1e-5), "what is beside alone")


def attached_first(variant: Variant) -> None:
    """Attached to the plain model, merged there, and injected afterwards: every bit as with the other order."""
    those = others(variant, torch.float32)
    model = attach_(fresh(variant), those)
    before = all_bits(model)
    merge(model)
    if not variant.quantized:
        state = merged_state_dict(model)
        assert torch.equal(state["inner.weight"], model.get_parameter("inner.weight"))
    unmerge(model)
    assert all_bits(model) == before
    load_adapter(model, take_adapter(filled(variant)))
    assert_same(model, attach_(filled(variant), those))
