"""load_adapter from every source and onto other bases. A load that fails leaves the model as it was."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    is_merged,
    load_adapter,
    merge,
    take_adapter,
    unload,
    unmerge,
)
from lightning_lora.exchange import apply
from support.covering import covering
from support.models.networks import (
    ZOO_LAYERS,
    Zoo,
    base_zoo,
    bits,
    checkpoint,
    randomise_,
    source,
    state_bits,
    tokens,
    trace,
    train,
    trained_zoo,
    zoo_config,
)

KINDS = ["adapter", "merged", "full", "bare", "state"]
FORMS = [f"{kind} {form}" for kind in KINDS for form in ("dictionary", "file")] + [" folder"]


@pytest.mark.core
@pytest.mark.parametrize(("given", "target"), covering(FORMS, ["fresh", "injected", "merged"], meet=1))
def test_load_adapter_from_every_source_onto_every_model(tmp_path, given: str, target: str):
    kind, form = given.split(" ")
    model, other = trained_zoo(), base_zoo()
    given_source = source(model, kind, form, tmp_path)
    if target != "fresh":
        inject(other, zoo_config())
        randomise_(other)
        merge(other) if target == "merged" else None
    elif kind in ("bare", "state"):
        before = trace(other)
        with pytest.raises(LoRAError, match=r"the source stores tensors and no options.* Call inject"):
            load_adapter(other, given_source)
        assert trace(other) == before
        return
    initial = state_bits(base_zoo())
    assert load_adapter(other, given_source) == ZOO_LAYERS
    assert is_merged(other) == (target == "merged")
    assert state_bits(other) == state_bits(model)
    unmerge(other)
    assert torch.equal(other(tokens()), model(tokens()))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    assert adapter_state_dict(other).keys() == adapter_state_dict(model).keys()
    unload(other)
    assert state_bits(other) == initial


def test_load_adapter_from_a_full_state_dict_compares_its_base():
    model, other = trained_zoo(), base_zoo()
    inject(other, zoo_config())
    load_adapter(other, model.state_dict())
    assert state_bits(other) == state_bits(model)
    assert adapter_state_dict(other).keys() == adapter_state_dict(model).keys()  # the base did not become a part of it
    with torch.no_grad():
        model.norm.weight.mul_(1.05)
    before = trace(other)
    with pytest.raises(LoRAError, match=r"another base: values of 'norm\.weight'"):
        load_adapter(other, model.state_dict())
    assert trace(other) == before


# --- another base ---


@pytest.mark.core
@pytest.mark.parametrize(
    ("layer", "kind"),
    covering(["embed.weight", "conv.weight", "norm.weight", "body.3.weight"], ["adapter", "merged"], meet=1),
)
def test_load_adapter_onto_another_base_is_refused_by_name(layer: str, kind: str):
    state = checkpoint(trained_zoo(), kind)
    other = base_zoo()
    with torch.no_grad():
        other.get_parameter(layer).mul_(1.05)
    before = trace(other)
    with pytest.raises(LoRAError, match=f"belongs to another base: values of '{layer}' were .*strict_base=False"):
        load_adapter(other, state)
    assert trace(other) == before
    with pytest.warns(UserWarning, match=f"another base: values of '{layer}'"):
        load_adapter(other, state, strict_base=False)
    assert {n: b for n, b in state_bits(other).items() if n != layer} == {
        n: b for n, b in state_bits(trained_zoo()).items() if n != layer
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_same_base_in_another_dtype_is_accepted_and_rounding_of_a_head_is_said(tmp_path, caplog, dtype):
    caplog.set_level("INFO", "lightning_lora")
    model, other = trained_zoo(), base_zoo().to(dtype)
    load_adapter(other, source(model, "", "folder", tmp_path))
    unload(other)
    load_adapter(other, checkpoint(model, "adapter"))
    assert other.conv.weight.dtype == dtype
    assert torch.equal(other.conv.lora_A.float(), model.conv.lora_A)
    found = re.findall(r"load_adapter: '(\S+)' was trained in float32 and is rounded to (\w+),", caplog.text)
    assert found == (
        [] if dtype == torch.float64 else [(name, f"{dtype}"[6:]) for name in ("body.0.bias", "conv.bias")]
    )
    caplog.clear()
    other = base_zoo().to(dtype)
    for name in take_adapter(model).whole_tensors().keys() & dict(other.named_parameters()).keys():
        other.get_parameter(name).data = other.get_parameter(name).data.float()
    load_adapter(other, checkpoint(model, "adapter"))
    assert torch.equal(other.head.weight, model.head.weight)
    assert "was trained in" not in caplog.text


# --- what does not fit ---


def test_a_loaded_adapter_has_its_own_layers_alone():
    """Beside others whose names end alike."""
    names = [f"p{number}" for number in range(8)]
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    other = copy.deepcopy(model)
    inject(model, LoRAConfig(r=1))
    other["others"] = nn.ModuleDict({name: nn.Linear(2, 2) for name in names[1:]})
    assert load_adapter(other, take_adapter(model)) == names


class Picky(Zoo):
    """Refuses an extra state that it does not know."""

    def get_extra_state(self) -> str:
        return "good"

    def set_extra_state(self, state: str) -> None:
        if state != "good":
            raise RuntimeError(f"cannot take {state}")


def picky() -> Picky:
    torch.manual_seed(1)
    return Picky().eval()


def trained_picky(unfreeze: bool) -> Picky:
    inject(model := picky(), zoo_config())
    if unfreeze:
        model.norm.weight.requires_grad_(True)
        with pytest.warns(UserWarning, match="unfrozen"):
            adapter_state_dict(model)
    train(model)
    return model.eval()


def all_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.core
@pytest.mark.parametrize("target", ["fresh", "unmerged", "merged"])
def test_a_failure_while_values_are_written_leaves_the_model_as_it_was_and_the_next_adapter_loads(target: str):
    state = checkpoint(trained_picky(unfreeze=True), "adapter")
    del state["state_dict"]["_extra_state"]
    state["state_dict"]["_extra_state"] = "bad"  # comes last, when all else is written
    other, good = picky(), trained_picky(unfreeze=False)
    if target != "fresh":
        inject(other, zoo_config())
    merge(other) if target == "merged" else None
    before = trace(other)
    with pytest.raises(RuntimeError, match="cannot take bad"):
        load_adapter(other, state)
    now = trace(other)
    assert {**now, "modules": None} == {**before, "modules": None}
    assert is_merged(other) == (target == "merged")
    assert target != "fresh" or now == before
    load_adapter(other, checkpoint(good, "adapter"))
    assert all_bits(other) == all_bits(good)
    assert adapter_state_dict(other).keys() == adapter_state_dict(good).keys()
    unload(other)
    assert all_bits(other) == all_bits(picky())


def test_ctrl_c_while_values_are_written_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    other = base_zoo()
    inject(other, zoo_config())
    randomise_(other)
    merge(other)
    before, honest, calls = state_bits(other), apply._write_, []

    def stopped_at_first(model: nn.Module, tensors: Any) -> None:
        honest(model, tensors)
        calls.append(len(tensors))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(apply, "_write_", stopped_at_first)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(other, checkpoint(trained_zoo(), "adapter"))
    assert state_bits(other) == before
    assert is_merged(other)


# --- a state dict one level down ---


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3))
    inject(net, LoRAConfig(r=2, **options))
    return net


@pytest.mark.parametrize("in_file", [True, False])
def test_a_state_dict_in_an_entry_is_found(tmp_path: Path, in_file: bool):
    trained, target = small(init_lora_weights=False), small()
    source: Any = {"epoch": 3, "optimizer": {"param_groups": [{"lr": 0.1}]}, "net": trained.state_dict()}
    if in_file:
        torch.save(source, tmp_path / "checkpoint.pt")
        source = tmp_path / "checkpoint.pt"
    assert load_adapter(target, source) == ["0"]
    assert torch.equal(target[0].lora_B, trained[0].lora_B)


def test_a_folder_of_pefts_without_a_layers_tensors_is_loaded_without_the_layer(tmp_path: Path):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, target_modules=["0", "2"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if ".2." not in name}, tmp_path / "adapter_model.safetensors"
    )
    assert load_adapter(net, tmp_path) == ["0"]


def test_what_a_peft_model_saves_in_an_entry_is_found():
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        theirs.base_model.model[0].lora_B["default"].weight.fill_(1.0)
    target = small()
    load_adapter(target, {"model": theirs.state_dict()})
    assert torch.equal(target[0].lora_B, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"model": {"0.weight": torch.ones(3, 3)}, "epoch": 1}, r"no lora_A.* 'model', 'epoch'"),
        (
            {"a": small().state_dict(), "b": small().state_dict()},
            r"'a' and 'b' .*checkpoint\['a'\]",
        ),
    ],
)
def test_a_dictionary_without_one_adapter_is_refused_with_what_it_holds(source: dict[str, Any], said: str):
    with pytest.raises(LoRAError, match=said):
        load_adapter(small(), source)
