"""attach: every form of source, what does not fit, what is no sum, and peft with several active adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    attach,
    attached,
    inject,
    load_adapter,
    merged_state_dict,
    save_adapter,
    scaled,
    set_strength,
    take_adapter,
)
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import checkpoint
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
X = torch.linspace(-1, 1, 24).view(3, 8)


class Model(nn.Module):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.table = nn.Embedding(5, 8)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(self.norm(self.fc1(x)).relu()) + self.table(torch.tensor([1])).mean()
        return result


def filled(seed: int = 3, model: Any = None, **options: Any) -> Any:
    model = Model() if model is None else model
    given: dict[str, Any] = {"r": 2, "target_modules": ["fc1", "fc2"], "init_lora_weights": False}
    inject(model, LoRAConfig(**given | options), seed=seed)
    return model


def wanted(*parts: tuple[Any, float]) -> torch.Tensor:
    """The model on W and the sum of these adapters, as merging each by itself gives it."""
    base = Model().state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for model, weight in parts:
        for name, value in merged_state_dict(model).items():
            if value.is_floating_point():
                total[name] += weight * (value - base[name])
    model = Model()
    model.load_state_dict(total)
    return model(X)


SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "adapter": lambda model, path: take_adapter(model),
    "folder": lambda model, path: (save_adapter(model, path / "folder"), path / "folder")[1],
    "full": lambda model, path: checkpoint(model, "full"),
    "merged": lambda model, path: checkpoint(model, "merged"),
}


@pytest.mark.parametrize(("source", "onto"), covering(SOURCES, ["plain", "injected"], meet=1))
def test_every_source_acts_as_it_was_trained(tmp_path: Path, source: str, onto: str):
    other = filled(5, r=3, lora_alpha=2)
    model = Model() if onto == "plain" else filled()
    assert attach(model, SOURCES[source](other, tmp_path), name="x", strength=0.5) == ["fc1", "fc2"]
    parts = [(other, 0.5)] + ([(filled(), 1.0)] if onto == "injected" else [])
    torch.testing.assert_close(model(X), wanted(*parts), rtol=1e-4, atol=1e-5)


def test_a_bare_state_dict_has_the_scaling_of_the_injected_model():
    bare, model = dict(adapter_state_dict(other := filled(5, lora_alpha=16))), filled(lora_alpha=16)
    attach(model, bare, name="x")
    torch.testing.assert_close(model(X), wanted((other, 1.0), (filled(lora_alpha=16), 1.0)), rtol=1e-4, atol=1e-5)
    with pytest.raises(LoRAError, match="the scaling of 'fc1' is not known"):
        attach(Model(), bare, name="x")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"variant": "loha"},
        {"rank_pattern": {"fc2": 4}, "alpha_pattern": {"fc1": 3}},
        {"enable_lora": {"fc1": [True, False]}},
    ],
)
def test_each_variant_but_dora_is_attached(options: dict[str, Any]):
    other = filled(5, **options)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = filled()
    attach(model, take_adapter(other), name="x")
    torch.testing.assert_close(model(X), wanted((filled(), 1.0), (other, 1.0)), rtol=1e-4, atol=1e-5)


def test_the_same_adapter_has_the_same_fingerprint_from_any_source(tmp_path: Path):
    def fingerprint(model: Any, source: Any, weight: float = 1.0) -> str:
        attach(model, source, name="x", strength=weight)
        found: str = open_model(model, "test", attached=True).injection.attached["x"].fingerprint
        return found

    other = filled(5)
    save_adapter(other, tmp_path / "x")
    net = nn.ModuleDict({"net": Model()})
    same = fingerprint(Model(), take_adapter(other))
    assert fingerprint(filled(), tmp_path / "x", 0.3) == fingerprint(net, tmp_path / "x") == same
    assert fingerprint(Model(), take_adapter(filled(6))) != same
    assert fingerprint(Model(), take_adapter(filled(5, lora_alpha=3))) != same


def trained_rows() -> Any:
    return filled(trainable_token_indices={"table": [1, 2]})


def with_head(value: float = 1.0) -> Any:
    model = filled(target_modules=["fc1"], modules_to_save=["fc2"])
    with torch.no_grad():
        model.fc2.weight.mul_(value)
    return model


def moved_statistics() -> Any:
    model = filled().train()
    model(X)
    return model.eval()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: filled(use_dora=True), "'x' is an adapter of DoRA"),
        (trained_rows, "'x' replaces rows of 'table'"),
        (lambda: with_head(2.0), "'x' also holds 'fc2.weight'"),
        (moved_statistics, "'x' also holds 'norm.running_mean'"),
        (lambda: filled(model=Model(seed=2)), "belongs to another base"),
        (lambda: filled(model=nn.Sequential(nn.Linear(8, 8)), target_modules=["0"]), "'0'"),
        (lambda: filled(target_modules=[], modules_to_save=["fc2"]), "'x' adapts no layer"),
    ],
)
def test_what_is_no_sum_or_does_not_fit_leaves_the_model_as_it_was(source: Any, message: str):
    model = filled()
    before, keys = model(X), vars(model).keys()
    with pytest.raises(LoRAError, match=message):
        attach(model, take_adapter(source()), name="x")
    assert torch.equal(model(X), before)
    assert attached(model) == {}
    assert vars(model).keys() == keys
    assert {type(module) for module in model.modules()} == {type(module) for module in filled().modules()}


def test_what_the_trained_adapter_changed_whole_is_no_hindrance_in_either_order():
    other, trained = take_adapter(filled(4)), take_adapter(moved_statistics())
    attach(first := Model(), other, name="x")
    load_adapter(first, trained)
    load_adapter(then := Model(), trained)
    attach(then, other, name="x")
    assert torch.equal(first(X), then(X))


def test_whole_tensors_with_the_values_of_the_model_are_no_hindrance_and_another_base_may_be_a_warning():
    model = Model()
    attach(model, take_adapter(with_head()), name="x")
    with pytest.warns(UserWarning, match="another base"):
        attach(model, take_adapter(filled(model=Model(seed=2))), name="y", strict_base=False)
    assert attached(model) == {"x": 1.0, "y": 1.0}


def test_a_name_is_a_text_without_dots_and_a_weight_a_finite_number():
    for name in ("", "a.b", 3):
        with pytest.raises(LoRAError, match="a name must be"):
            attach(Model(), take_adapter(filled()), name=name)  # type: ignore[arg-type]
    for weight in (float("inf"), "1", True):
        with pytest.raises(LoRAError, match="a strength must be"):
            attach(Model(), take_adapter(filled()), name="x", strength=weight)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:lightning_lora. adapter. belongs to another base")
def test_layers_that_cannot_be_adapted_say_why():
    model = Model()
    model.fc1 = torch.nn.utils.parametrizations.weight_norm(model.fc1)
    with pytest.raises(LoRAError, match=r"attach: 'fc1': the weight of the .* is computed from others"):
        attach(model, take_adapter(filled()), name="x", strict_base=False)
    model = Model()
    model.fc1 = nn.Conv1d(8, 16, 1)
    with pytest.raises(LoRAError, match="'fc1' was a Linear layer in training, here it is Conv"):
        attach(model, take_adapter(filled()), name="x", strict_base=False)
    model.fc1 = nn.Linear(8, 15)
    with pytest.raises(LoRAError, match=r"'fc1' needs A \(2, 8\) and B \(15, 2\), found \(2, 8\) and \(16, 2\)"):
        attach(model, take_adapter(filled()), name="x", strict_base=False)


def test_peft_with_several_active_adapters_computes_the_same(tmp_path: Path):
    names = {"default": (3, 2), "sft": (5, 3), "style": (6, 1)}
    for name, (seed, rank) in names.items():
        save_adapter(filled(seed, r=rank, lora_alpha=4), tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "default")
    for name in ("sft", "style"):
        theirs.load_adapter(tmp_path / name, name)
    ours = Model()
    load_adapter(ours, tmp_path / "default")
    for name in ("sft", "style"):
        attach(ours, tmp_path / name, name=name)

    def active(*which: str) -> torch.Tensor:
        theirs.base_model.set_adapter(list(which))
        return theirs(X)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours(X), active("default", "sft", "style"), **close)
    with scaled(ours, 0.0):
        torch.testing.assert_close(ours(X), active("sft", "style"), **close)
    with scaled(ours, 0.0, "style"):
        torch.testing.assert_close(ours(X), active("default", "sft"), **close)
    theirs.add_weighted_adapter(["default", "sft", "style"], [1.0, 0.7, -0.3], "mixed", combination_type="cat")
    theirs.set_adapter("mixed")
    set_strength(ours, {"sft": 0.7, "style": -0.3})
    torch.testing.assert_close(ours(X), theirs(X), **close)
