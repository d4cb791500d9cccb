"""Which bases an adapter accepts: each tolerance of its fingerprint from both sides, and a false description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAError, inject, load_adapter, load_from_checkpoint, save_adapter
from lightning_lora.adapter.fingerprint import entries_match
from lightning_lora.exchange.take import fingerprint
from lightning_lora.model.adapted_model import open_model
from support.models import checkpoint, source
from support.runs import lora, trained
from support.training import FEATURES, Data, Net, assert_same_tensors, make_trainer, weights

COARSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the spacing of values from 1 to 2


class Base(nn.Module):
    """An adapted layer, and a frozen parameter with one value in all places."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layer = nn.Linear(4, 4)
        table = torch.full((3, 5), value, dtype=torch.float64).to(dtype)
        self.table = nn.Parameter(table, requires_grad=False)


def load(path: Path, saved: Base, here: Base, kind: str = "", form: str = "folder") -> None:
    """The adapter of one base onto another."""
    for model in (saved, here):
        inject(model, lora(target_modules=["layer"]).config)
    load_adapter(here, saved.state_dict() if kind == "whole state" else source(saved, kind, form, path))


def assert_let_in(accepted: bool, step: Callable[[], Any], name: str = "table", *, rounded: bool = False) -> None:
    if accepted and rounded:
        with pytest.warns(UserWarning, match=rf"with other digits \('{name}': .*outputs differ a little"):
            step()
    elif accepted:
        step()
    else:
        with pytest.raises(LoRAError, match=rf"belongs to another base: values of '{name}' were .*strict_base=False"):
            step()


@pytest.mark.parametrize(("difference", "accepted"), [(5e-6, True), (9e-6, True), (1.1e-5, False), (1e-3, False)])
@pytest.mark.parametrize(
    ("kind", "form"), [("", "folder"), ("adapter", "file"), ("merged", "dictionary"), ("whole state", "")]
)
def test_a_base_of_the_same_dtype_is_let_in_up_to_one_in_a_hundred_thousand(
    tmp_path, kind: str, form: str, difference: float, accepted: bool
):
    assert_let_in(accepted, lambda: load(tmp_path, Base(1.0), Base(1 + difference), kind, form))
    assert_let_in(accepted, lambda: load(tmp_path, Base(1 + difference), Base(1.0), kind, form))


@pytest.mark.parametrize("dtype", COARSE)
def test_a_base_of_the_same_coarse_dtype_must_be_equal(tmp_path, dtype: torch.dtype):
    load(tmp_path / "equal", Base(1.0, dtype), Base(1.0, dtype))
    assert_let_in(False, lambda: load(tmp_path / "next", Base(1.0, dtype), Base(1 + COARSE[dtype], dtype)))


@pytest.mark.parametrize(("spacings", "accepted"), [(0.75, True), (1.125, False)])
@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_a_base_in_another_dtype_is_let_in_up_to_the_rounding_of_the_coarser_one(
    tmp_path, coarse: torch.dtype, fine: torch.dtype, spacings: float, accepted: bool
):
    value = 1 + spacings * COARSE[coarse]
    assert_let_in(accepted, lambda: load(tmp_path / "finer", Base(1.0, coarse), Base(value, fine)), rounded=True)
    assert_let_in(accepted, lambda: load(tmp_path / "coarser here", Base(value, fine), Base(1.0, coarse)))


def test_the_error_of_a_base_in_another_dtype_names_both(tmp_path):
    said = r"on a base in bfloat16, and this one is in float32, which changes values: try the base in bfloat16\. Load"
    with pytest.raises(LoRAError, match=said):
        load(tmp_path, Base(1.0, torch.bfloat16), Base(1.01))


@pytest.mark.parametrize(("difference", "accepted"), [(9e-6, True), (1.1e-5, False)])
@pytest.mark.parametrize("other", [torch.float64, torch.int8])
def test_another_dtype_that_rounds_no_more_makes_no_base_fit_better(
    tmp_path, other: torch.dtype, difference: float, accepted: bool
):
    assert_let_in(accepted, lambda: load(tmp_path, Base(1.0, other), Base(1 + difference)))


@pytest.mark.parametrize(
    ("saved", "value", "accepted"),
    [
        (torch.float16, 9e-8, True),
        (torch.float16, 1.1e-7, False),
        (torch.float32, 1e-30, False),
    ],
)
def test_what_is_too_small_for_float16_is_let_in_between_dtypes_alone(
    tmp_path, saved: torch.dtype, value: float, accepted: bool
):
    assert_let_in(accepted, lambda: load(tmp_path, Base(0.0, saved), Base(value)), rounded=True)


@pytest.mark.parametrize(("spacings", "accepted"), [(0.9, True), (1.5, False)])
def test_weights_quantised_alike_are_let_in_up_to_one_spacing_of_bfloat16(spacings: float, accepted: bool):
    before, now = (
        {"shape": [1], "dtype": "float32", "values": [value], "quantised": "nf4"}
        for value in (1.0, 1 + spacings * COARSE[torch.bfloat16])
    )
    assert entries_match(before, now, 1e-5) == accepted
    assert not entries_match(before, now | {"quantised": "int8"}, 1e-5)


# --- the base that was trained on here ---


@pytest.fixture
def fitted(tmp_path) -> tuple[Net, Path]:
    model = trained(tmp_path, Net(), lora())
    model.trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    return model, tmp_path / "adapter.ckpt"


@pytest.mark.parametrize(("difference", "accepted"), [(9e-3, True), (1.1e-2, False)])
def test_the_base_that_was_trained_on_here_may_have_drifted_by_one_per_cent(
    fitted: tuple[Net, Path], difference: float, accepted: bool
):
    model, path = fitted
    with torch.no_grad():
        model.body[3].weight.mul_(1 + difference)
    assert_let_in(accepted, lambda: load_adapter(model, path), r"body\.3\.weight")


@pytest.mark.parametrize("where", ["another model", "loaded anew"])
def test_a_base_that_was_not_trained_on_here_may_not_drift(fitted: tuple[Net, Path], where: str):
    model, path = fitted
    base = weights(Net())
    base["body.3.weight"] *= 1 + 9e-3
    if where == "another model":
        model = Net()
        inject(model, lora().config)
    model.load_state_dict(base)
    assert_let_in(False, lambda: load_adapter(model, path), r"body\.3\.weight")


def test_a_base_that_lacks_a_parameter_of_the_one_that_was_trained_on_here_is_named():
    """Also where another base was trained on here, whose parameters are compared first."""
    here, saved = Base(1.0), Base(1.0)
    saved.other = nn.Parameter(torch.ones(3), requires_grad=False)
    for model in (here, saved):
        inject(model, lora(target_modules=["layer"]).config)
    open_model(here, "the test").record.fingerprint = fingerprint(here)
    with pytest.raises(LoRAError, match="belongs to another base: its frozen parameter 'other' is not here"):
        load_adapter(here, checkpoint(saved, "adapter"))


# --- a description with a changed scaling ---


def split_off(meta: dict[str, Any], scaling: float) -> None:
    """Another scaling for 'body.3' in the list of layers."""
    ((kind, before, names),) = meta["layers"]
    meta["layers"] = [[kind, before, [n for n in names if n != "body.3"]], [kind, scaling, ["body.3"]]]


def in_layers(meta: dict[str, Any]) -> None:
    split_off(meta, 3.0)


def in_options(meta: dict[str, Any]) -> None:
    meta["config"]["alpha_pattern"] = {"body.3": 6}


def in_both(meta: dict[str, Any]) -> None:
    in_layers(meta)
    in_options(meta)


@pytest.fixture
def edited(tmp_path, request) -> Path:
    """A checkpoint with another scaling for 'body.3' in its description."""
    path = tmp_path / "edited.ckpt"
    model = trained(tmp_path, Net(), lora(save=request.param[1]))
    model.trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    request.param[0](checkpoint["lora"])
    torch.save(checkpoint, path)
    return path


SAID = r"layer 'body\.3' .*scaling|'body\.3': the options say a scaling"
KINDS = ("adapter", "merged", "full")


WAYS: dict[str, Callable[[Path, Net, Path], Any]] = {
    "load_adapter": lambda folder, model, path: load_adapter(model, path),
    "resume": lambda folder, model, path: make_trainer(folder, lora(), max_epochs=2).fit(model, Data(), ckpt_path=path),
    "test": lambda folder, model, path: make_trainer(folder, lora()).test(model, Data(), ckpt_path=path),
}


@pytest.mark.parametrize(
    ("edited", "way"),
    [
        ((edit, kind), way)
        for edit in (in_layers, in_options, in_both)
        for kind in KINDS
        for way in WAYS
        if (edit, way) != (in_both, "load_adapter")  # which takes another scaling
    ],
    indirect=["edited"],
)
def test_a_description_with_a_changed_scaling_is_refused_and_names_the_layer(tmp_path, edited: Path, way: str):
    model = Net()
    inject(model, lora().config)
    before = weights(model)
    with pytest.raises(LoRAError, match=SAID):
        WAYS[way](tmp_path, model, edited)
    assert_same_tensors(weights(model), before)


@pytest.mark.parametrize("edited", [(e, k) for e in (in_layers, in_options) for k in KINDS], indirect=True)
def test_a_description_that_contradicts_itself_in_a_scaling_is_refused_by_a_fresh_model_too(edited: Path):
    model = Net()
    before = weights(model)
    with pytest.raises(LoRAError, match=SAID):
        load_adapter(model, edited)
    assert_same_tensors(weights(model), before)
    with pytest.raises(LoRAError, match=SAID):
        load_from_checkpoint(Net, edited)


@pytest.mark.parametrize(("factor", "accepted"), [(1.01, False), (1 + 1e-12, True)])
def test_a_recorded_scaling_that_is_not_the_options_own_is_refused_however_near(factor: float, accepted: bool):
    model = Base(1.0)
    inject(model, lora(target_modules=["layer"]).config)
    state = checkpoint(model, "adapter")
    state["lora"]["layers"] = [[kind, scaling * factor, names] for kind, scaling, names in state["lora"]["layers"]]
    if accepted:
        assert load_adapter(Base(1.0), state) == ["layer"]
    else:
        with pytest.raises(LoRAError, match=r"'layer': the options say a scaling \(lora_alpha over r\) of"):
            load_adapter(Base(1.0), state)


class Renormalises(Net):
    """Each forward renormalises in place the rows that it reads of a frozen table."""

    def build_body(self) -> None:
        super().build_body()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.table = self.table_class(8, FEATURES, max_norm=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table(torch.arange(8)[:, None]).reshape(8, -1))

    table_class: type[nn.Module] = nn.Embedding


class RenormalisesBags(Renormalises):
    table_class = nn.EmbeddingBag


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
@pytest.mark.parametrize("cls", [Renormalises, RenormalisesBags])
def test_a_table_that_forwards_renormalise_is_no_other_base_and_has_lost_nothing(tmp_path, cls, kind: str):
    """The Trainer's own checkpoint comes back into the model that trained it, and onto a new base."""
    model = cls()
    trainer = make_trainer(tmp_path, LoRACallback(r=1, save=kind), max_epochs=1)
    trainer.fit(model, Data())  # a warning would be an error
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    losses = [trainer.test(model, Data(), ckpt_path=path, verbose=False) for path in (None, tmp_path / "a.ckpt")]
    assert losses[0] == losses[1]
    trainer.test(load_from_checkpoint(cls, tmp_path / "a.ckpt"), Data(), verbose=False)
    assert trainer.callback_metrics["test_loss"] == pytest.approx(losses[0][0]["test_loss"])
    save_adapter(model, tmp_path / "folder")
    load_adapter(cls(), tmp_path / "folder")


def test_another_base_beside_a_table_that_forwards_renormalise_is_named(tmp_path):
    model, other = Renormalises(), Renormalises(seed=2)
    inject(model, lora().config)
    save_adapter(model, tmp_path / "folder")
    with pytest.raises(LoRAError, match=r"belongs to another base: values of 'body\.0\.weight'"):
        load_adapter(other, tmp_path / "folder")
