"""FSDPStrategy (FSDP1): as one device, on any number of ranks, in every door."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import wrap

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merge,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.trainer import fsdp1 as fsdp1_file
from support.ranks.fits import Case, Run, State, alone, assert_close, assert_run_equals_one_device_and_is_resumed, fit
from support.ranks.fsdp1 import fsdp1, gathered_by_fsdp1
from support.ranks.processes import world
from support.ranks.sharded import (
    CLASSES,
    HIDDEN,
    TARGETS,
    Plain,
    X,
    base_of,
    data,
    loader,
    make_trainer,
)
from support.ranks.sharded_adapters import Plus, Scheduled, assert_same_bits

slow = pytest.mark.slow

LAYERS = {"auto_wrap_policy": {nn.Linear}}  # a unit for each layer; otherwise one for the whole model


class Unfreezing(Plain):
    """Unfreezes two layers in the second epoch, which FSDP1 has wrapped by then."""

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch >= 1:
            warnings.filterwarnings("ignore", "lightning_lora: base parameters were unfrozen")
            self.net[0].weight.requires_grad_()
            self.net[4].bias.requires_grad_()


class Manual(Plain):
    """Takes its steps itself, and one of two batches into each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Referring(Plain):
    """Compares with the base in each step, as preference tuning does."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with disable_adapter(self), torch.no_grad():
            reference = self(batch[0])
        return super().training_step(batch, batch_idx) + (self(batch[0]) - reference).square().mean()


class Wrapping(Plain):
    """Wraps some layers itself, one of which it builds there."""

    def configure_model(self) -> None:
        if not hasattr(self, "built"):
            self.built = True
            torch.manual_seed(3)
            self.net[2] = nn.Linear(HIDDEN, HIDDEN)
            inject(self, LoRAConfig(r=2, target_modules=TARGETS), seed=1)
            for place in (0, 2):
                self.net[place] = wrap(self.net[place])  # under another strategy nothing happens


class Various(Plain):
    """An embedding, an LSTM, a convolution and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.lstm = nn.Embedding(10, 6), nn.LSTM(6, 5, batch_first=True)
        self.net = nn.Sequential(nn.Conv1d(5, 6, 1), nn.ReLU(), nn.Conv1d(6, 3, 1))
        self.experts = nn.Parameter(torch.randn(2, 3, 3) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.table((x.abs() * 3).long().clamp(max=9)))
        return torch.einsum("bi,eij->bj", super().forward(hidden.transpose(1, 2)).mean(-1), self.experts)


@dataclass
class OfFSDP1(Case):
    def on_ranks(self, path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        return fsdp1(path, *callbacks, options=self.strategy, **options)

    def gathered(self, trainer: Any) -> State:
        return gathered_by_fsdp1(trainer)


CASES = {
    "SHARD_GRAD_OP, LoRA+, modules_to_save, accumulated": OfFSDP1(
        {"sharding_strategy": "SHARD_GRAD_OP"},
        Plus,
        {"target_modules": ["0", "2"], "modules_to_save": ["4"]},
        {"accumulate_grad_batches": 2},
    ),
    "SHARD_GRAD_OP, layers, SGD, a scheduler, DoRA": OfFSDP1(
        {"sharding_strategy": "SHARD_GRAD_OP"} | LAYERS, Scheduled, {"use_dora": True}
    ),
    "NO_SHARD, bias, rank pattern, clipped": OfFSDP1(
        {"sharding_strategy": "NO_SHARD"},
        lora={"bias": "all", "rank_pattern": {"2": 3}},
        trainer={"gradient_clip_val": 0.1},
    ),
    "CPU offload, PiSSA": OfFSDP1({"cpu_offload": True} | LAYERS, lora={"init_lora_weights": "pissa"}),
    "LoHa": OfFSDP1(lora={"variant": "loha", "r": 1}),
}


@slow
@pytest.mark.parametrize("name", CASES)
def test_run_equals_one_device_and_is_resumed_exactly_by_ranks_and_by_one_device(tmp_path, name):
    assert_run_equals_one_device_and_is_resumed(CASES[name], tmp_path)


VARIOUS: dict[str, Any] = {
    "target_modules": ["net.0", "net.2"],
    "target_parameters": ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "experts"],
    "trainable_token_indices": {"table": [1, 3]},
    "rank_pattern": {"experts": 1},
}
OTHERS = {
    "steps by hand": OfFSDP1(LAYERS, model=Manual),
    "a reference pass": OfFSDP1(model=Referring),
    "configure_model wraps": OfFSDP1(model=Wrapping),
    "recomputed activations": OfFSDP1(LAYERS | {"activation_checkpointing_policy": {nn.Linear}}),
    "units of several kinds": OfFSDP1({"auto_wrap_policy": {nn.LSTM, nn.Embedding}}, model=Various, lora=VARIOUS),
    "embedding, DoRA": OfFSDP1(model=Various, lora={"target_modules": ["table", "net.0", "net.2"], "use_dora": True}),
}


def evaluated_after_fit(case: Case, path: Path, ranks: bool) -> list[float]:
    model, callback = case.build(0)
    options = {"max_epochs": 2, **case.trainer}
    trainer = (
        fsdp1(path, callback, options=case.strategy, **options) if ranks else make_trainer(path, callback, **options)
    )
    training, validation = data() if ranks else (loader(), loader(seed=6))
    trainer.fit(model, training, validation)
    trainer.validate(model, validation, verbose=False)
    return model.losses


@slow
@pytest.mark.parametrize("name", OTHERS)
def test_fit_and_its_evaluation_equal_one_device(tmp_path, name):
    expected = evaluated_after_fit(OTHERS[name], tmp_path, False)
    for losses in world().run(evaluated_after_fit, OTHERS[name], tmp_path, True):
        assert losses == pytest.approx(expected, abs=1e-6)


# --- files ---


BASE = sorted(f"net.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias"))
FACTORS = sorted(f"net.{i}.lora_{leaf}" for i in (0, 2, 4) for leaf in "AB")


def names_in(path: Path) -> list[str]:
    """What the state dict of a checkpoint holds."""
    return sorted(torch.load(path, weights_only=True)["state_dict"])


class SavingInside(Plain):
    """Saves inside of its steps, while FSDP1 has plain tensors in place of the frozen parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.names = sorted(adapter_state_dict(self))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            assert is_merged(self)
            path = Path(self.trainer.default_root_dir)
            save_adapter(self, path / "adapter")
            self.trainer.save_checkpoint(path / "inside.ckpt")


def saved_inside(path: Path, strategy: dict[str, Any], save: str) -> tuple[list[str], State]:
    torch.manual_seed(0)
    model = SavingInside()
    trainer = fsdp1(path, LoRACallback(r=2, target_modules=TARGETS, save=save), options=strategy, max_epochs=2)
    trainer.fit(model, *data())
    return model.names, gathered_by_fsdp1(trainer)


@slow
@pytest.mark.parametrize(
    ("strategy", "save"),
    [
        ({}, "adapter"),
        ({"sharding_strategy": "SHARD_GRAD_OP"} | LAYERS, "merged"),
        ({"sharding_strategy": "NO_SHARD"}, "merged"),
    ],
    ids=str,
)
def test_what_is_saved_inside_of_a_step_is_what_is_saved_outside(tmp_path, strategy, save):
    names, state = world().run(saved_inside, tmp_path, strategy, save)[0]
    assert names == FACTORS
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(names)
    assert names_in(tmp_path / "inside.ckpt") == (BASE if save == "merged" else FACTORS)
    for name in ("inside.ckpt", "adapter"):
        load_adapter(loaded := Plain(), tmp_path / name)
        assert_same_bits(dict(loaded.state_dict()), state)
    assert_same_bits(dict(load_from_checkpoint(Plain, tmp_path / "inside.ckpt").state_dict()), state)


# --- weights that are changed inside of a step ---


class LoadingInStep(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        load_adapter(self, take_adapter(self))


class LeavingMerged(Plain):
    """Merges between forward and backward."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        unmerge(self)  # which has nothing to do
        merge(self)
        return loss


class MergingInForward(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.net[2].register_forward_pre_hook(lambda *args: merge(self))
        return super().training_step(batch, batch_idx)


class MergingInBackward(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            self.net[2].register_full_backward_hook(lambda *args: merge(self))
        return super().training_step(batch, batch_idx)


WHOLE_IN_BF16 = {"sharding_strategy": "NO_SHARD", "mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)}
REFUSED = "the weights of .* cannot be changed while FSDP1 computes with them. Call it between steps, not inside"


def error_inside(path: Path, kind: type[Plain], strategy: dict[str, Any]) -> str:
    torch.manual_seed(0)
    trainer = fsdp1(path, LoRACallback(r=2, target_modules=TARGETS), options=strategy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRACallback: the model stays merged")
        try:
            trainer.fit(kind(), *data())
        except (LoRAError, RuntimeError) as error:
            return str(error)
    return ""


@slow
@pytest.mark.parametrize("strategy", [{}, WHOLE_IN_BF16], ids=["sharded", "whole in bfloat16"])
def test_weights_changed_inside_of_a_step_are_an_error(tmp_path, strategy):
    for kind, said in (
        (LoadingInStep, f"^unmerge: {REFUSED}"),
        (LeavingMerged, f"^merge: {REFUSED}"),
        (MergingInForward, f"^merge: {REFUSED}"),
        (MergingInBackward, f"^merge: {REFUSED}"),
    ):
        for error in world().run(error_inside, tmp_path, kind, strategy):
            assert re.search(said, error), kind


# --- faults ---


class Faulty(Plain):
    """Breaks in the second epoch: inside a merged forward, or by a value on one rank that is not finite."""

    fault = ""

    def on_validation_start(self) -> None:
        if self.fault == "nan" and self.trainer.current_epoch == 1 and dist.get_rank() == 1:
            flat = self.trainer.model._handle.flat_param
            place = flat._shard_param_infos[flat._fqns.index("net.4.weight")]
            flat._local_shard[place.offset_in_shard] = math.nan

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 1:
            assert is_merged(self) == (self.fault == "exception")
            if self.fault == "exception":
                self.net[2].register_forward_hook(lambda *args: 1 / 0)
        super().validation_step(batch, batch_idx)


def broken(path: Path, strategy: dict[str, Any], fault: str) -> tuple[Faulty, list[str], Any]:
    """The model after a fit, what was said, and the Trainer."""
    if strategy.get("sharding_strategy") == "HYBRID_SHARD":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        strategy = strategy | {"device_mesh": mesh}
    torch.manual_seed(0)
    model = Faulty()
    model.fault = fault
    trainer = fsdp1(path, LoRACallback(r=2, target_modules=TARGETS), options=strategy, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError) if fault == "exception" else contextlib.nullcontext():
            trainer.fit(model, *data())
    return model, [text for each in caught if (text := str(each.message)).startswith("LoRACallback")], trainer


def broken_in_a_forward(path: Path, strategy: dict[str, Any]) -> State:
    model, messages, _ = broken(path, strategy, "exception")
    assert len(messages) == (dist.get_rank() == 0)
    assert all(re.match(f"LoRACallback: the model stays merged: unmerge: {REFUSED}", each) for each in messages)
    assert is_merged(model)
    save_adapter(model, path / "adapter")
    factors = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    assert_refused(unmerge, model)
    with pytest.raises((RuntimeError, LoRAError)):  # when Lightning casts the model
        fit_again(model)
    return factors


def assert_refused(use: Callable[[Plain], None], model: Plain) -> None:
    with pytest.raises(LoRAError, match=f"{REFUSED}.*After an exception in a forward build the model again"):
        use(model)


def fit_again(model: Plain) -> None:
    fsdp1(Path(), LoRACallback(r=2, target_modules=TARGETS), max_epochs=1).fit(model, *data())


@slow
@pytest.mark.parametrize("strategy", [{}, WHOLE_IN_BF16], ids=["sharded", "whole in bfloat16"])
def test_exception_in_a_forward_ends_the_fit_as_itself_and_leaves_the_adapter_to_save(tmp_path, strategy):
    for factors in world().run(broken_in_a_forward, tmp_path, strategy):
        load_adapter(loaded := Plain(), tmp_path / "adapter")
        assert_same_bits(dict(adapter_state_dict(loaded)), factors)


def broken_by_a_value(path: Path, strategy: dict[str, Any]) -> tuple[list[str], State]:
    model, messages, trainer = broken(path, strategy, "nan")
    assert not is_merged(model)
    return messages, base_of(gathered_by_fsdp1(trainer))


@slow
@pytest.mark.parametrize("size", [2, 4])
def test_slice_of_one_rank_that_is_not_finite_is_evaluated_unmerged_and_leaves_the_base(tmp_path, size):
    """The other ones of four ranks have a slice of their own, which is finite."""
    strategy = {"sharding_strategy": "HYBRID_SHARD"} if size == 4 else {}
    found = world(size).run(broken_by_a_value, tmp_path, strategy)
    assert "this validation runs unmerged: merge: layer 'net.4'" in found[0][0][0]
    for _, state in found[:2]:
        weight, whole = state["net.4.weight"], Plain().net[4].weight.detach()
        assert weight.isnan().sum() == 1
        state["net.4.weight"] = torch.where(weight.isnan(), whole, weight)
        assert_same_bits(state, dict(Plain().state_dict()))


# --- more ranks, gradients ---


def hybrid(path: Path, source: Path | None) -> Run:
    """Two groups of ranks have the same slices."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    case = OfFSDP1({"sharding_strategy": "HYBRID_SHARD", "device_mesh": mesh} | LAYERS)
    case.lora = {"save": "merged"}
    return fit(case, path, 3 if source else 2, source, seed=5 if source else 0)


@slow
def test_replicated_slices_train_save_and_resume_as_one_device(tmp_path):
    expected = alone(OfFSDP1(), tmp_path / "alone", 3)
    first = world(4).run(hybrid, tmp_path / "first", None)
    for found in world(4).run(hybrid, tmp_path / "second", first[0].file):
        assert_close(found, expected, 1)
    assert_same_bits(dict(load_from_checkpoint(Plain, first[0].file).state_dict()), first[0].state)


class WithHead(Plain):
    """Each rank draws another head."""

    place = "cpu"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.net[4] = nn.Linear(HIDDEN, CLASSES, device=self.place)


class ReferringLate(Referring, Unfreezing):
    """Unfreezes weights, whose first values the reference pass would need."""


class WithLegacyHook(Plain):
    def configure_sharded_model(self) -> None:
        raise AssertionError


class WithHeadOnMeta(WithHead):
    place = "meta"


HEAD: dict[str, Any] = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "seed": 1}


def trained_head(path: Path) -> State:
    trainer = fsdp1(path, LoRACallback(r=2, **HEAD), max_epochs=1)
    trainer.fit(WithHead(), *data())
    return gathered_by_fsdp1(trainer)


@slow
def test_what_is_trained_starts_alike_on_all_ranks(tmp_path):
    assert_same_bits(*world().run(trained_head, tmp_path))


def averaged() -> dict[str, Any]:
    """Means of gradients of several dtypes and sizes, of which this rank lacks some."""
    rank = dist.get_rank()
    parameters = {
        "both": nn.Parameter(torch.zeros(2, 3)),
        "one": nn.Parameter(torch.zeros(3)),
        "none": nn.Parameter(torch.zeros(3)),
        "half": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        "frozen": nn.Parameter(torch.zeros(2), requires_grad=False),
        "large": nn.Parameter(torch.zeros(fsdp1_file.BUCKET // 4)),
        "transposed": nn.Parameter(torch.zeros(3, 2).T),
    }
    for name, parameter in parameters.items():
        if name in ("both", "half", "large", "transposed") or (name == "one" and rank == 0):
            parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape) + rank
    fsdp1_file.average_gradients_(list(parameters.values()))
    return {name: None if p.grad is None else p.grad[..., :6].tolist() for name, p in parameters.items()}


@slow
def test_gradients_are_means_over_all_ranks_and_count_as_zero_where_one_lacks_them():
    for found in world().run(averaged):
        assert found["both"] == found["transposed"] == [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]
        assert found["one"] == [0, 0.5, 1]
        assert found["none"] is None
        assert found["frozen"] is None
        assert found["half"] == [0.5, 1.5]
        assert found["large"] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


# --- functions on a wrapped model, and what cannot be right ---


def used_by_functions(path: Path, strategy: dict[str, Any]) -> None:
    model, callback = OfFSDP1().build(0)
    trainer = fsdp1(path, callback, options=strategy, max_epochs=2)
    trainer.fit(model, *data())
    torch.manual_seed(4)
    inject(other := Plain(), LoRAConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    trainer.save_checkpoint(path / "all.ckpt")
    with merged(model):
        state = merged_state_dict(model)
    save_merged(model, path / "merged")
    written = load_file(path / "merged" / "model.safetensors")
    assert_same_bits({name: value.contiguous() for name, value in state.items()}, written)
    before, wrapped = gathered_by_fsdp1(trainer), trainer.model
    with torch.no_grad():
        factored = wrapped(X)
        with merged(wrapped):
            torch.testing.assert_close(wrapped(X), factored, atol=1e-6, rtol=0)
        assert torch.equal(wrapped(X), factored)
        with disable_adapter(model):
            torch.testing.assert_close(wrapped(X), Plain()(X))
        assert_same_bits(gathered_by_fsdp1(trainer), before)
        load_adapter(model, take_adapter(other))  # of another rank
        torch.testing.assert_close(wrapped(X), other(X))
        merge(model)
        load_adapter(wrapped, path / "all.ckpt")
        unmerge(model)
        assert_same_bits(base_of(gathered_by_fsdp1(trainer)), dict(Plain().state_dict()))
        unload(model)
        torch.testing.assert_close(wrapped(X), Plain()(X))


@slow
@pytest.mark.parametrize("strategy", [{}, {"sharding_strategy": "SHARD_GRAD_OP"} | LAYERS], ids=["one unit", "layers"])
def test_functions_take_the_model_and_its_wrapper(tmp_path, strategy):
    world().run(used_by_functions, tmp_path, strategy)


class WrappingEarly(Plain):
    """Wraps a layer before it is adapted."""

    def configure_model(self) -> None:
        self.net[2] = wrap(nn.Linear(HIDDEN, HIDDEN))


class WeightAveraging(L.Callback):
    """Has the name of Lightning's own, which older versions lack."""


def error_of(kind: type[Plain], path: Path, lora: dict[str, Any], callbacks: Any) -> str:
    callback = LoRACallback(**{"r": 2, "target_modules": TARGETS} | lora)
    trainer = fsdp1(path, callback, *[each() for each in callbacks], max_epochs=2)
    try:
        trainer.fit(kind(), *data())
    except LoRAError as error:
        return str(error)
    return ""


@slow
def test_what_cannot_be_right_is_an_error_with_the_remedy(tmp_path):
    for kind, lora, callbacks, said in (
        (Plain, {"init_lora_weights": "lora_ga"}, (), "the weight of 'net.0' is sharded"),
        (WrappingEarly, {}, (), "the weight of the Linear is sharded already; call inject"),
        (WithHeadOnMeta, HEAD, (), "a trained parameter of shape (3, 7) is on the meta device"),
        (ReferringLate, {}, (), "disable_adapter: 'net.0.weight' is trained and sharded, so a forward gathers"),
        (Unfreezing, {}, (), "a weight was unfrozen after FSDP1 had wrapped it. Unfreeze it before fit, or name"),
        (WithLegacyHook, {}, (), "configure_sharded_model wraps layers in FSDP1"),
        (Plain, {}, (WeightAveraging,), "WeightAveraging copies whole weights, and FSDPStrategy has slices"),
    ):
        for error in world().run(error_of, kind, tmp_path, lora, callbacks):
            assert said in error


def saved_merged_for_good(path: Path, ranks: bool) -> tuple[State, float]:
    """What a checkpoint holds that is saved when the fit has merged the adapter for good."""
    model, callback = OfFSDP1(lora={"merge_after_fit": True}).build(0)
    options: Any = {"max_epochs": 1}
    trainer = fsdp1(path, callback, options=LAYERS, **options) if ranks else make_trainer(path, callback, **options)
    training, validation = data() if ranks else (loader(), loader(seed=6))
    trainer.fit(model, training, validation)
    trainer.save_checkpoint(path / "merged.ckpt")
    trainer.validate(model, validation, verbose=False)
    return torch.load(path / "merged.ckpt", weights_only=True), model.losses[-1]


@slow
def test_checkpoint_is_saved_after_the_adapter_was_merged_for_good(tmp_path):
    expected, loss = saved_merged_for_good(tmp_path / "alone", False)
    for found, found_loss in world().run(saved_merged_for_good, tmp_path / "ranks", True):
        assert found_loss == pytest.approx(loss, abs=1e-6)
        for name, value in expected["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][name], value, atol=2e-6, rtol=0)
        states = [each["optimizer_states"][0]["state"] for each in (found, expected)]
        assert states[0].keys() == states[1].keys()
        for number, state in states[1].items():
            torch.testing.assert_close(states[0][number], state, atol=2e-6, rtol=0)
