"""Which bases an adapter accepts: the tolerance of its fingerprint from both sides, and a false description."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAError, inject, load_adapter, load_from_checkpoint, save_adapter
from lightning_lora.adapter.fingerprint import REMEDY, Entry, compare_fingerprints
from support.models.networks import checkpoint, fingerprint, source
from support.runs.training import FEATURES, Data, Net, assert_same_tensors, make_trainer, weights
from support.runs.with_callback import lora, trained


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
    load_adapter(here, source(saved, kind, form, path))


@pytest.mark.parametrize(("difference", "accepted"), [(9.9e-3, True), (1.1e-2, False)])
@pytest.mark.parametrize(("kind", "form"), [("", "folder"), ("merged", "dictionary")])
def test_a_base_is_let_in_up_to_one_in_a_hundred(tmp_path, kind: str, form: str, difference: float, accepted: bool):
    for pair in ((1.0, 1 + difference), (1 + difference, 1.0)):
        saved, here = map(Base, pair)
        if accepted:
            load(tmp_path, saved, here, kind, form)
        else:
            with pytest.raises(LoRAError, match=r"another base: values of 'table' were .*strict_base=False"):
                load(tmp_path, saved, here, kind, form)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.bfloat16, 1 + 2**-8), (torch.float16, 1e-7), (torch.float64, -0.3), (torch.bfloat16, math.nan)],
)
def test_a_base_in_another_dtype_is_let_in(tmp_path, dtype: torch.dtype, value: float):
    load(tmp_path / "here", Base(value), Base(value, dtype))
    load(tmp_path / "saved", Base(value, dtype), Base(value))


def deep() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))


def another_checkpoint(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)


def one_layer_changed(model: nn.Module) -> None:
    model.get_parameter("3.weight").data.add_(0.1 * torch.randn(32, 32))


def a_small_adapter_merged_in(model: nn.Module) -> None:
    """Of 1 % of the weights' norm, into two layers."""
    for name in ("1.weight", "4.weight"):
        weight = model.get_parameter(name).data
        change = torch.randn(32, 2) @ torch.randn(2, 32)
        weight.add_(change * 0.01 * weight.norm() / change.norm())


@pytest.mark.parametrize(
    ("change", "count"), [(another_checkpoint, 12), (one_layer_changed, 1), (a_small_adapter_merged_in, 2)]
)
def test_another_base_of_the_same_shapes_is_named(tmp_path, change: Callable[[nn.Module], None], count: int):
    saved, here = deep(), deep()
    torch.manual_seed(3)
    change(here)
    for model in (saved, here):
        inject(model, lora(target_modules=["0"]).config)
    save_adapter(saved, tmp_path)
    with pytest.raises(
        LoRAError, match=rf"another base: values of .*{count} of 12 frozen tensors differ \('"
    ) as caught:
        load_adapter(here, tmp_path)
    assert str(caught.value).count("weight'") + str(caught.value).count("bias'") <= 4  # one with values, three names


def test_values_of_many_parameters_are_those_of_some_and_another_checkpoint_is_named(tmp_path):
    """As of experts one by one. The other parameters count with their names and shapes."""
    models = [nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(600))) for _ in range(2)]
    for model in models:
        inject(model, lora(target_modules=["7"]).config)
    saved = fingerprint(models[0])
    assert sum(bool(entry.values) for entry in saved.values()) == 512
    assert len(saved) == 600
    save_adapter(models[0], tmp_path)
    with pytest.raises(LoRAError, match=r"another base: values of '0.weight'.* 5[01]\d of 600 frozen tensors differ"):
        load_adapter(models[1], tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    load_adapter(models[1], tmp_path)


def test_a_base_that_lacks_a_parameter_of_the_one_that_was_trained_on_is_named():
    here, saved = Base(1.0), Base(1.0)
    saved.other = nn.Parameter(torch.ones(3), requires_grad=False)
    for model in (here, saved):
        inject(model, lora(target_modules=["layer"]).config)
    with pytest.raises(LoRAError, match="belongs to another base: its frozen parameter 'other' is not here"):
        load_adapter(here, checkpoint(saved, "adapter"))


def entries(different: int, quantized: str = "", of: int = 4) -> dict[str, Entry]:
    """The fingerprint of a base, of which the last tensors have other values."""
    values = [float(i < of - different) for i in range(of)]
    return {f"{i}": Entry("float32", [1], [each]) for i, each in enumerate(values)} | {
        "9": Entry("float32", [8, 8], [], quantized)
    }


def test_the_advice_of_another_base_is_of_a_new_head_only_where_few_tensors_differ():
    for different, of, is_head in ((1, 4, True), (2, 4, False), (4, 4, False), (4, 60, True), (5, 60, False)):
        with pytest.raises(LoRAError, match="belongs to another base: values of") as refused:
            compare_fingerprints(entries(different, of=of), entries(0, of=of))
        assert ("A new head" in str(refused.value)) == is_head
        assert str(refused.value).endswith(REMEDY)


def test_where_base_and_quantization_differ_the_quantization_is_named_first():
    with pytest.raises(LoRAError, match=r"base: at '9' the base was quantized.* Quantize the base .* Load the adapter"):
        compare_fingerprints(entries(4), entries(0, "nf4"))


# --- a description with a changed scaling ---


def in_layers(meta: dict[str, Any]) -> None:
    """Another scaling for 'body.3' in the list of layers."""
    ((kind, before, names),) = meta["layers"]
    meta["layers"] = [[kind, before, [n for n in names if n != "body.3"]], [kind, 3.0, ["body.3"]]]


def in_options(meta: dict[str, Any]) -> None:
    """Another scaling for 'body.3' in the words."""
    meta["config"]["alpha_pattern"] = {"body.3": 6}


@pytest.fixture
def edited(tmp_path, request) -> Path:
    """A checkpoint with a changed description."""
    path = tmp_path / "edited.ckpt"
    model = trained(tmp_path, Net(), lora(save=request.param[1]))
    model.trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    request.param[0](checkpoint["lora"])
    torch.save(checkpoint, path)
    return path


def resume(folder: Path, model: Net, path: Path) -> None:
    make_trainer(folder, lora(), max_epochs=2).fit(model, Data(), ckpt_path=path)


def evaluate(folder: Path, model: Net, path: Path) -> None:
    make_trainer(folder, lora()).test(model, Data(), ckpt_path=path)


@pytest.mark.parametrize(
    ("edited", "way"),
    [((in_layers, "adapter"), resume), ((in_layers, "merged"), evaluate), ((in_layers, "full"), resume)],
    indirect=["edited"],
)
def test_the_scaling_of_a_layer_is_that_of_the_list_of_layers_and_a_trainer_with_another_refuses_it(
    tmp_path, edited: Path, way: Any
):
    load_adapter(model := Net(), edited)
    assert model.body[3].lora.spec.scaling == 3.0
    inject(injected := Net(), lora().config)
    before = weights(injected)
    with pytest.raises(LoRAError, match=r"layer 'body\.3' .*scaling"):
        way(tmp_path, injected, edited)
    assert_same_tensors(weights(injected), before)
    load_adapter(injected, edited)
    assert injected.body[3].lora.spec.scaling == 3.0


@pytest.mark.parametrize(
    ("edited", "way"),
    [((in_options, "adapter"), resume), ((in_options, "merged"), lambda _, model, path: load_adapter(model, path))],
    indirect=["edited"],
)
def test_options_in_a_file_are_words(tmp_path, edited: Path, way: Any):
    model = Net()
    inject(model, lora().config)
    before = model.body[3].lora.spec
    way(tmp_path, model, edited)
    assert model.body[3].lora.spec == before


@pytest.mark.parametrize("scaling", [math.nan, "2"])
def test_a_scaling_that_is_no_number_is_refused(scaling: Any):
    inject(model := Base(1.0), lora(target_modules=["layer"]).config)
    state = checkpoint(model, "adapter")
    state["lora"]["layers"] = [["Linear", scaling, ["layer"]]]
    with pytest.raises(LoRAError, match=r"description is damaged.*no scaling"):
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


@pytest.mark.parametrize(("cls", "kind"), [(Renormalises, "adapter"), (RenormalisesBags, "merged")])
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
