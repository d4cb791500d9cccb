"""Every verb inside of every block: refused and nothing changed, or what it gives outside of the block."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    attach,
    attached,
    detach,
    disable_adapter,
    initialize_from_data,
    inject,
    is_merged,
    load_adapter,
    lora_param_groups,
    merge_and_unload,
    merged,
    merged_state_dict,
    merged_tensors,
    save_adapter,
    save_merged,
    scaled,
    set_strength,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.adapter.adapter import Adapter
from lightning_lora.nn.claims import REFUSED

X = torch.linspace(-1, 1, 24).view(3, 8)
MODELS = ("trained", "attached", "both", "head")  # "head": an adapter with a layer that is trained whole


def net() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def filled(seed: int, **options: Any) -> Any:
    inject(model := net(), LoRAConfig(**{"r": 2, "init_lora_weights": False} | options), seed=seed)
    return model


def other(seed: int, **options: Any) -> Adapter:
    return take_adapter(filled(seed, **options))


def model_with(which: str) -> Any:
    if which == "head":
        model = filled(3, target_modules=["0"], modules_to_save=["2"])
        with torch.no_grad():
            model[2].weight += 1
        return model
    model = net() if which == "attached" else filled(3)
    if which != "trained":
        attach(model, other(1), name="b", strength=0.5)
    return model


def at(strength: float) -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda model: scaled(model, strength, "b" if attached(model) else "")


BLOCKS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "merged": merged,
    "scaled": at(3.0),
    "off": at(0.0),
    "disable_adapter": disable_adapter,
}
CHANGES: dict[str, Callable[[Any], object]] = {
    "inject": lambda m: inject(m, LoRAConfig(r=2)),
    "load_adapter": lambda m: load_adapter(m, other(7)),
    "load_adapter of other layers": lambda m: load_adapter(m, other(7, target_modules=["0"])),
    "attach": lambda m: attach(m, other(8), name="c"),
    "detach": lambda m: detach(m, "b"),
    "set_strength": lambda m: set_strength(m, 0.25, "b"),
    "unload": unload,
    "merge_and_unload": merge_and_unload,
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
}


READS: dict[str, Callable[[Any, Path], object]] = {
    "take_adapter": lambda m, _: take_adapter(m, name=a_name_in(m)),
    "save_adapter": lambda m, path: save_adapter(m, path / "saved", name=a_name_in(m)),
    "adapter_state_dict": lambda m, _: adapter_state_dict(m),
    "lora_param_groups": lambda m, _: lora_param_groups(m, lr=0.1),
    "state_dict": lambda m, _: m.state_dict(),
    "deepcopy": lambda m, _: copy.deepcopy(m),
    "pickle": lambda m, _: pickle.dumps(m),
}
MERGED_WEIGHTS: dict[str, Callable[[Any, Path], dict[str, torch.Tensor]]] = {
    "merged_state_dict": lambda m, _: merged_state_dict(m),
    "merged_tensors": lambda m, _: dict(merged_tensors(m)),
    "save_merged": lambda m, path: saved_merged(m, path / "saved"),
}


def saved_merged(model: Any, path: Path) -> dict[str, torch.Tensor]:
    save_merged(model, path)
    return load_file(path / "model.safetensors")


def a_name_in(model: Any) -> str:
    """The trained adapter, or the attached one of a model that has no other."""
    return "" if any("lora_A" in name for name, _ in model.named_parameters()) else "b"


def has_work(verb: str, which: str) -> bool:
    """Whether the verb has something to do outside of any block."""
    if verb == "inject":
        return which == "attached"
    if verb == "unload":
        return which != "attached"
    return which in ("attached", "both") if verb in ("detach", "set_strength") else True


def can_be_entered(block: str, which: str) -> bool:
    """A layer that is trained whole acts or does not: no strength lies between."""
    return (block, which) != ("scaled", "head")


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("verb", CHANGES)
@pytest.mark.parametrize("block", BLOCKS)
def test_what_changes_a_model_is_refused_inside_of_scaled_and_disable_adapter(block: str, verb: str, which: str):
    if not (has_work(verb, which) and can_be_entered(block, which)):
        return
    model, twin = model_with(which), model_with(which)
    before = model(X)
    with BLOCKS[block](model):
        inside = model(X)
        if block == "merged":
            CHANGES[verb](model)
        else:
            with pytest.raises(LoRAError, match="refused inside"):
                CHANGES[verb](model)
            assert torch.equal(model(X), inside)
    if block == "merged":
        CHANGES[verb](twin)
        before = twin(X)
    assert attached(model) == attached(twin)
    torch.testing.assert_close(model(X), before)
    assert block == "merged" or torch.equal(model(X), before)


@pytest.mark.parametrize("which", ["trained", "attached", "both"])
@pytest.mark.parametrize("block", ["scaled", "off"])
def test_what_is_taken_saved_or_copied_inside_of_scaled_is_the_model_outside_of_it(
    block: str, which: str, tmp_path: Path
):
    model = model_with(which)
    before, state = model(X), model.state_dict()
    with BLOCKS[block](model):
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(X), before)
            assert attached(again) == attached(model)
            outside, inside = merged_state_dict(again), merged_state_dict(model)
            assert not torch.equal(outside["0.weight"], inside["0.weight"])
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        if which != "attached":
            taken = take_adapter(model)
            save_adapter(model, tmp_path / "saved")
        if which != "trained":
            save_adapter(model, tmp_path / "b", name="b")
    if which != "attached":
        assert {name: each.strength for name, each in taken.attached.items()} == attached(model)
        load_adapter(model, taken)
        load_adapter(model, tmp_path / "saved")
    assert torch.equal(model(X), before)
    if which != "trained":
        attach(again := net(), tmp_path / "b", name="b", strength=0.5)
        attach(one := net(), other(1), name="b", strength=0.5)
        torch.testing.assert_close(again(X), one(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["plain copies", "values"])
@pytest.mark.parametrize("which", MODELS)
def test_a_copy_made_inside_of_merged_is_a_merged_model_that_unmerges_to_each_bit(
    which: str, kept: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    if kept == "values":
        monkeypatch.setattr(sys.modules["lightning_lora.model.merging"], "COPY_BUDGET", 0)
    model, x = model_with(which).to(dtype), X.to(dtype)
    before, state = model(x), model.state_dict()
    with merged(model):
        inside, copies = model(x), [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for again in copies:
        assert is_merged(again)
        assert torch.equal(again(x), inside)
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
        unmerge(again)
        assert torch.equal(again(x), before)
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("verb", READS)
@pytest.mark.parametrize(("block", "which"), [("off", "head"), *(("disable_adapter", each) for each in MODELS)])
def test_what_reads_trained_tensors_is_refused_where_others_stand_in_their_places(
    block: str, which: str, verb: str, tmp_path: Path
):
    if which == "attached" and verb in ("adapter_state_dict", "lora_param_groups"):
        return  # they read a trained adapter, which this model has not
    model = model_with(which)
    before = model(X)
    with BLOCKS[block](model):
        inside = model(X)
        with pytest.raises(LoRAError, match="refused inside"):
            READS[verb](model, tmp_path)
        assert torch.equal(model(X), inside)
    assert not list(tmp_path.iterdir())
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("verb", MERGED_WEIGHTS)
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_merged_weights_are_what_acts_inside_of_a_block(block: str, which: str, verb: str, tmp_path: Path):
    if not can_be_entered(block, which):
        return
    model = model_with(which)
    with BLOCKS[block](model):
        inside = model(X)
        if block == "disable_adapter":
            with pytest.raises(LoRAError, match="refused inside"):
                MERGED_WEIGHTS[verb](model, tmp_path)
            return
        weights = MERGED_WEIGHTS[verb](model, tmp_path)
    (plain := net()).load_state_dict(weights)
    torch.testing.assert_close(plain(X), inside)


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_adapters_do_not_start_from_data_inside_of_a_block(block: str, which: str):
    if which == "attached" or not can_be_entered(block, which):
        return
    options = {"modules_to_save": ["2"], "target_modules": ["0"]} if which == "head" else {}
    model = filled(3, init_lora_weights="eva", **options)
    if which == "both":
        attach(model, other(1), name="b", strength=0.5)
    before, state = model(X), copy.deepcopy(model.state_dict())
    with BLOCKS[block](model), pytest.raises(LoRAError, match="merged" if block == "merged" else "refused inside"):
        initialize_from_data(model, [X])
    assert torch.equal(model(X), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    initialize_from_data(model, [X])
    assert not torch.equal(model[0].lora_A, state["0.lora_A"])


def test_every_verb_of_the_table_is_right_inside_of_merged():
    assert all("merged" not in blocks for blocks in REFUSED.values())


@pytest.mark.parametrize("weight", [1e39, 10**400, float("nan"), float("inf"), True, "1"])
def test_one_rule_says_what_a_strength_is(weight: Any):
    model = model_with("both")
    before = model(X)
    for call in (
        lambda: set_strength(model, weight, "b"),
        lambda: scaled(model, weight).__enter__(),
        lambda: attach(model, other(9), name="c", strength=weight),
    ):
        with pytest.raises(LoRAError, match="finite number"):
            call()
    assert torch.equal(model(X), before)


def test_a_number_of_numpy_is_a_strength():
    numpy = pytest.importorskip("numpy")
    model = model_with("both")
    set_strength(model, numpy.float32(0.25), "b")
    attach(model, other(9), name="c", strength=numpy.float32(0.25))
    assert attached(model) == {"b": 0.25, "c": 0.25}
    twin = model_with("both")
    set_strength(twin, 0.25, "b")
    with scaled(model, numpy.float32(0.0), "c"):
        torch.testing.assert_close(model(X), twin(X))


def test_an_attached_adapter_needs_what_it_was_trained_beside(tmp_path):
    both = model_with("both")
    torch.save(both.state_dict(), file := tmp_path / "state.pt")
    in_entries = [{"state_dict": both.state_dict()}, {"model": both.state_dict()}]
    for source in (take_adapter(both), both.state_dict(), file, *in_entries):
        with pytest.raises(LoRAError, match=r"attach\(model, source, name='b'"):
            attach(filled(3), source, name="c")
        with pytest.raises(LoRAError, match=r"attach\(model, source, name='b'"):
            load_adapter(filled(3), source)


def test_factors_that_are_not_finite_are_not_attached():
    adapter = other(1)
    adapter.tensors["0.lora_B"][0, 0] = torch.nan
    with pytest.raises(LoRAError, match=r"0\.lora_B"):
        attach(net(), adapter, name="c")


class Foreign(nn.Module):
    in_features = out_features = 8

    def __init__(self, how: str = "same") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> Any:
        made = {"same": x, "tanh": x.tanh(), "strided": x[:1].expand_as(x), "two": (x, x), "swapped": x.T}
        return made[self.how]


@pytest.mark.parametrize("kind", ["same", "tanh", "strided", "two", "swapped"])
def test_the_output_of_a_foreign_layer_is_never_added_to_in_place_and_its_map_is_checked(kind: str):
    inject(trained := nn.ModuleDict({"a": Foreign()}), LoRAConfig(r=2, target_modules=["a"], init_lora_weights=False))
    attach(model := nn.ModuleDict({"a": Foreign(kind)}), take_adapter(trained), name="b")
    x = X.clone().requires_grad_()
    if kind in ("two", "swapped"):
        with pytest.raises(LoRAError, match="maps"):
            model["a"](x)
        return
    y = model["a"](x)
    y.sum().backward()
    assert torch.equal(x, X)
    expected = Foreign(kind)(plain := X.clone().requires_grad_()) + trained["a"](plain) - plain
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.parametrize("kind", ["same", "tanh", "strided", "two", "swapped"])
def test_a_foreign_layer_with_strength_0_keeps_its_input_and_its_map_is_checked(kind: str):
    inject(model := nn.ModuleDict({"a": Foreign()}), LoRAConfig(r=2, target_modules=["a"], init_lora_weights=False))
    attach(model, take_adapter(model), name="b")
    model["a"].how = kind
    x = X.clone().requires_grad_()
    for strengths in ({"": 0.0}, {"": 0.0, "b": 0.0}):
        with scaled(model, strengths):
            if kind in ("two", "swapped"):
                with pytest.raises(LoRAError, match="maps"):
                    model["a"](x)
                continue
            y = model["a"](x)
            y.sum().backward()
        assert torch.equal(x, X)
        product = 0 if strengths.get("b") == 0 else low_rank_product(model["a"])
        torch.testing.assert_close(y, Foreign(kind)(X) + product)


def low_rank_product(layer: Any) -> torch.Tensor:
    a, b = (layer.stored()[leaf].detach() for leaf in ("lora_A", "lora_B"))
    return layer.lora.spec.scaling * X @ a.T @ b.T
