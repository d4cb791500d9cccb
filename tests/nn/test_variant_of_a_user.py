"""Variants that users define: they train, merge, are saved and loaded as ours, and a program without one says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    Variant,
    adapter_state_dict,
    attach,
    combine,
    disable_adapter,
    export_adapter,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    scaled,
    summary,
    take_adapter,
    unload,
    unmerge,
)
from support.covering import covering
from support.devices.pretend_device import CAN_PRETEND, pretend_device
from support.models.methods import moved
from support.models.networks import state_bits
from support.models.quantized import NF4, OF_BITSANDBYTES, inputs, network, quantized, values_of
from support.ranks.processes import DONE, run_in_forks
from support.runs.training import Net, assert_same_tensors, fit_model, outputs, weights

on_device = pytest.mark.skipif(not CAN_PRETEND, reason="this version of torch cannot pretend a device")
TARGETS = ["body.0", "body.3", "head"]
SQUARE, INSIDE_A, INSIDE_B = "lora_own_square", "lora_own_A", "lora_own_B"


class Squares(Variant):
    """W' = W + s * B @ R @ A: R is trained, A and B are frozen singular vectors (LoRA-XS, arXiv:2405.17604)."""

    name, title = "own-squares", "squares"
    trained, frozen = (SQUARE,), (INSIDE_A, INSIDE_B)
    own_options = {"size": 0.0}  # noqa: RUF012
    follows_weight = True

    def shapes(self, info: Any) -> dict[str, tuple[int, ...]]:
        a, b = info.factor_shapes()
        return {SQUARE: (info.rank, info.rank), INSIDE_A: a, INSIDE_B: b}

    def start(self, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        left, values, right = torch.linalg.svd(weight().float(), full_matrices=False)
        r = info.rank
        square = torch.full((r, r), info.options["size"])
        return {SQUARE: square, INSIDE_A: right[:r], INSIDE_B: left[:, :r] @ values[:r].diag()}

    def is_initial(self, stored: Any, info: Any) -> bool:
        return bool((stored[SQUARE] == info.options["size"]).all())

    def effective_factors(self, stored: Any, weight: Any, scaling: float) -> Any:
        return stored[SQUARE] @ stored[INSIDE_A], stored[INSIDE_B], None


class Gates(Variant):
    """W' = g * (W + s * B @ A) by outputs, with a trained g: a scale that does not depend on W."""

    name, title = "own-gates", "gates"
    trained = ("lora_own_a", "lora_own_b", "lora_own_gate")
    has_scale = True

    def shapes(self, info: Any) -> dict[str, tuple[int, ...]]:
        a, b = info.factor_shapes()
        return dict(zip(self.trained, (a, b, b[:1]), strict=True))

    def start(self, info: Any, weight: Any) -> dict[str, torch.Tensor]:
        a, b, gate = self.shapes(info).values()
        draw = torch.Generator().manual_seed(info.seed)
        values = torch.randn(a, generator=draw), torch.zeros(b), torch.ones(gate)
        return dict(zip(self.trained, values, strict=True))

    def effective_factors(self, stored: Any, weight: Any, scaling: float) -> Any:
        assert weight is None
        return tuple(stored[leaf] for leaf in self.trained)


class Undeclared(Gates):
    """The same, by a class that does not say that it has a scale."""

    name = "own-undeclared"
    trained = ("lora_undeclared_a", "lora_undeclared_b", "lora_undeclared_gate")
    has_scale = False


NAMES = ("own-squares", "own-gates")
each = pytest.mark.parametrize("name", NAMES)


def filled(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    """A model with an adapter that is away from where it starts."""
    model = Net() if model is None else model
    inject(model, LoRAConfig(variant=name, r=2, lora_alpha=3, target_modules=TARGETS, **options))
    return moved(model, seed=3)


def reference(layer: Any, name: str) -> torch.Tensor:
    """W' in float64, from the definition."""
    stored = {leaf: value.detach().double() for leaf, value in layer.named_parameters() if leaf.startswith("lora_")}
    if name == "own-squares":
        return layer.weight.detach().double() + 1.5 * stored[INSIDE_B] @ stored[SQUARE] @ stored[INSIDE_A]
    a, b, gate = stored.values()
    return gate[:, None] * (layer.weight.detach().double() + 1.5 * b @ a)


# --- a model ---


@pytest.mark.parametrize("place", [nullcontext, pytest.param(pretend_device, marks=on_device)])
def test_a_scale_of_one_changes_no_bit_of_the_outputs(place: Any):
    with place() as device:
        model = nn.Sequential(nn.Linear(64, 32)).to(device, torch.bfloat16)
        x = torch.randn(40, 64).to(device, torch.bfloat16)
        with torch.no_grad():
            model[0].bias.mul_(30)
        plain = model(x).cpu()
        inject(model, LoRAConfig(variant="own-gates", r=2, target_modules=["0"]))
        assert torch.equal(model(x).cpu(), plain)


@pytest.mark.parametrize(("name", "dtype"), covering(NAMES, [torch.float32, torch.bfloat16]))
def test_it_answers_by_its_definition_merges_exactly_and_is_taken_out(name, dtype):
    model = filled(name, Net().to(dtype)).eval()
    plain = Net().to(dtype).eval()
    before, expected = state_bits(model), reference(model.head, name)
    x = torch.randn(4, 8).to(dtype)
    close = {"rtol": 0, "atol": 30 * torch.finfo(dtype).eps}
    torch.testing.assert_close(model.head(x).double(), x.double() @ expected.T + model.head.bias.double(), **close)
    for _ in range(2):
        merge(model)
        torch.testing.assert_close(model.head.weight.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        unmerge(model)
        assert state_bits(model) == before
    merged = merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged.head.weight.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with disable_adapter(model):
        assert torch.equal(model.head(x), plain.head(x))
    unload(model)
    assert state_bits(model) == state_bits(plain)


def blocks_of(model: Any) -> list[torch.Tensor]:
    (block,) = model.head.update_blocks()
    return [block.left, block.right]


RESULTS: dict[str, Callable[[Any], Any]] = {
    "merge": lambda model: [merge_and_unload(model).head.weight],
    "merged_state_dict": lambda model: list(merged_state_dict(model).values()),
    "adapter": lambda model: list(take_adapter(model).effective_factors("head")[:2]),
    "update": blocks_of,
    "start": lambda model: list(model.head.initial_values().values()),
}


def test_autocast_rounds_nothing_outside_a_forward():
    for what, result in RESULTS.items():
        model, other = (filled("own-squares") for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            found = result(model)
        for each_found, expected in zip(found, result(other), strict=True):
            assert each_found.dtype == expected.dtype
            assert torch.equal(each_found, expected), what


@each
def test_a_new_one_adds_nothing_and_copies_are_alike(name):
    model = Net()
    inject(model, LoRAConfig(variant=name, r=2, target_modules=TARGETS))
    torch.testing.assert_close(outputs(model), outputs(Net()))
    model = filled(name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), outputs(model))


@each
def test_gradients_reach_all_that_it_trains_and_nothing_else(name):
    model = filled(name)
    model(torch.randn(8, 6)).square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {
        f"{layer}.{leaf}" for layer in TARGETS for leaf in {"own-squares": Squares, "own-gates": Gates}[name].trained
    }


def test_an_option_of_its_own_reaches_its_start():
    model = Net()
    inject(model, LoRAConfig(variant="own-squares", variant_options={"size": 0.5}, r=2, target_modules=TARGETS))
    assert torch.equal(model.head.lora_own_square, torch.full((2, 2), 0.5))


def test_a_base_loaded_later_is_what_an_untrained_one_starts_from_and_a_trained_one_stays():
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(6, 4))
    base = copy.deepcopy(other).state_dict()
    inject(other, config := LoRAConfig(variant="own-squares", r=2, target_modules=["0"]))
    inject(model := nn.Sequential(nn.Linear(6, 4)), config)
    model.load_state_dict(base)
    assert_same_tensors(adapter_state_dict(model), adapter_state_dict(other))
    with torch.no_grad():
        model[0].lora_own_square.add_(1)
    trained = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    model.load_state_dict({name: value + 1 for name, value in base.items()})
    assert_same_tensors(adapter_state_dict(model), trained)


# --- a scale ---


def in_scaled(model: Any) -> None:
    with scaled(model, 0.5):
        model(torch.randn(1, 6))


PLACES: dict[str, Callable[[Any, Path], object]] = {
    "forward": lambda model, _: outputs(model),
    "merge": lambda model, _: merge(model),
    "scaled": lambda model, _: in_scaled(model),
    "combine": lambda model, _: combine([take_adapter(model)], [1.0]),
    "served form": lambda model, path: export_adapter(take_adapter(model), path, plain=True),
    "attach": lambda model, _: attach(Net(), take_adapter(model), name="own"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_scale_that_the_class_does_not_declare_is_an_error_and_not_lost(place, tmp_path):
    with pytest.raises(LoRAError, match=r"Undeclared returns a scale.*has_scale = True"):
        PLACES[place](filled("own-undeclared"), tmp_path / "served")


@pytest.mark.parametrize("place", ["combine", "served form", "attach", "scaled"])
def test_a_declared_scale_is_refused_where_only_sums_of_products_go(place, tmp_path):
    with pytest.raises(LoRAError, match=f"{Gates.title}.*(cannot be combined|no product|no sum|no strength between)"):
        PLACES[place](filled("own-gates"), tmp_path / "served")


@pytest.mark.parametrize("kind", [*OF_BITSANDBYTES[::4], NF4])
def test_a_scale_that_needs_no_weight_trains_on_a_quantized_layer(kind):
    model = quantized(kind)
    before = model(inputs())
    inject(model, LoRAConfig(variant="own-gates", r=2, lora_alpha=3))
    torch.testing.assert_close(model(inputs()), before)
    moved(model, seed=3)
    x, expected = inputs(), inputs().double()
    for layer in model:
        if isinstance(layer, nn.ReLU):
            expected = expected.relu()
        else:
            a, b, gate = (getattr(layer, leaf).detach().double() for leaf in Gates.trained)
            expected = expected @ (gate[:, None] * (values_of(layer) + 1.5 * b @ a)).T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-3, atol=1e-3)
    model(x).square().sum().backward()
    assert all(getattr(model[0], leaf).grad.any() for leaf in Gates.trained)
    dense = network()
    dense.load_state_dict(merged_state_dict(model, dequantize=torch.float32))
    torch.testing.assert_close(dense(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_a_scale_that_needs_no_weight_is_merged_without_reading_it():
    """Reading it gathers a sharded one."""
    model = filled("own-gates")

    def read() -> Any:
        raise AssertionError("the weight was read")

    (block,) = Gates().blocks(model.head.stored(), model.head.layer_info(), read)
    assert torch.equal(block.scale.flatten(), model.head.lora_own_gate)


# --- a Trainer ---


@pytest.mark.slow
@pytest.mark.parametrize(("save", "name"), covering(["adapter", "merged", "full"], NAMES, meet=1))
def test_a_run_resumed_from_each_kind_of_checkpoint_equals_the_uninterrupted_one(tmp_path, name, save):
    def fit(path: str | None, epochs: int) -> tuple[Net, Any]:
        torch.manual_seed(0)
        model, saves = Net(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
        callback = LoRACallback(variant=name, r=2, target_modules=TARGETS, save=save)
        trainer = fit_model(tmp_path, model, callback, saves, ckpt_path=path, max_epochs=epochs)
        return model, trainer

    whole, _ = fit(None, 4)
    resumed, _ = fit(str(tmp_path / "epoch=1.ckpt"), 4)
    assert_same_tensors(weights(resumed), weights(whole))
    again = Net()
    load_adapter(again, tmp_path / "epoch=3.ckpt")
    assert torch.equal(outputs(again), outputs(whole))
    built = load_from_checkpoint(Net, tmp_path / "epoch=3.ckpt")
    assert torch.equal(outputs(built), outputs(whole))


# --- files ---


def test_pefts_folder_is_refused_by_name_as_peft_does_not_have_it(tmp_path):
    model = filled("own-gates")
    assert Gates.title in str(summary(model))
    with pytest.raises(LoRAError, match=f"save_adapter: .*{Gates.title}.*PEFT does not have"):
        save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())


UNKNOWN = """
import pytest, torch
from lightning_lora import LoRAError, load_adapter
net = torch.nn.Module()
net.body, net.head = torch.nn.Sequential(*[torch.nn.Linear(6, 8)] * 4), torch.nn.Linear(8, 3)
with pytest.raises(LoRAError, match=r"{match}"):
    load_adapter(net, r"{path}")
assert not any("lora" in name for name, _ in net.named_parameters())
"""


@pytest.mark.slow
def test_a_program_that_does_not_know_it_refuses_its_files_by_name(tmp_path: Path):
    model, saved = filled("own-squares"), tmp_path / "adapter.ckpt"
    fit_model(tmp_path, model, LoRACallback(), saved=saved, max_epochs=0)
    torch.save(adapter_state_dict(model), tmp_path / "state.pt")
    found = run_in_forks(
        {
            "checkpoint": (["torch", "pytest"], UNKNOWN.format(path=saved, match="variant 'own-squares'.*not known")),
            "tensors": (["torch", "pytest"], UNKNOWN.format(path=tmp_path / "state.pt", match="lora_own_.*no variant")),
        }
    )
    assert found == {"checkpoint": DONE, "tensors": DONE}


# --- what is refused ---


def test_an_unknown_name_is_an_error_with_near_misses_and_the_remedy():
    with pytest.raises(LoRAError, match=r"import the file that defines.*did you mean 'own-squares'"):
        LoRAConfig(variant="own_squares")


def test_a_leaf_of_another_prefix_is_refused():
    with pytest.raises(ValueError, match="'other_leaf' must begin with 'lora_'"):
        type("Other", (Variant,), {"name": "own-other", "trained": ("other_leaf",)})
