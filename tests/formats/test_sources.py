"""Damaged and hostile sources: always a LoRAError, no code is run, and the model stays as it was."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, adapter_state_dict, combine, inject, load_adapter, save_adapter
from lightning_lora.command.info import info
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint
from lightning_lora.formats.sources import adapter_with_options
from support.covering import covering
from support.models.networks import base_zoo, checkpoint, state_bits, trace, trained_zoo


class Hostile:
    """Pickled code: unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def assert_refused(given_source: Any, match: str | None = None) -> None:
    for model in (base_zoo(), trained_zoo()):
        before = trace(model)
        with pytest.raises(LoRAError, match=match):
            load_adapter(model, given_source)
        assert trace(model) == before


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch", "safetensors"])
def test_pickled_code_does_not_run(tmp_path, form):
    path, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    content = checkpoint(trained_zoo(), "adapter")
    content["state_dict"]["extra"] = Hostile(mark)
    if form == "safetensors":
        save_adapter(trained_zoo(), path := tmp_path / "adapter")
        (path / "adapter_model.safetensors").write_bytes(pickle.dumps(Hostile(mark)))
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert_refused(path, "holds objects other than plain types and tensors|cannot be read as safetensors")
    assert not mark.exists()
    beside = checkpoint(trained_zoo(), "adapter") | {"hyper_parameters": {"loss": Hostile(mark)}}
    torch.save(beside, tmp_path / "beside.ckpt")
    load_adapter(model := base_zoo(), tmp_path / "beside.ckpt")  # which is passed over
    assert state_bits(model) == state_bits(trained_zoo())
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # it would have


def test_source_that_is_missing_or_no_adapter_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": None}, tmp_path / "none.ckpt")
    torch.save({1: torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "numbers.ckpt")
    torch.save(base_zoo().state_dict(), tmp_path / "base.ckpt")
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "nothing.ckpt", "there is no such file")
    assert_refused(tmp_path / "list.ckpt", "expected a dictionary, found list")
    assert_refused(tmp_path / "empty.ckpt", "holds no lora_A")
    assert_refused(tmp_path / "none.ckpt", "expected a state dict, found NoneType")
    assert_refused(tmp_path / "numbers.ckpt", "holds no lora_A")
    assert_refused(tmp_path / "base.ckpt", "holds no lora_A")
    assert_refused(tmp_path / "folder", r"adapter_config\.json")
    assert_refused({"lora": 3, "state_dict": {}}, r'checkpoint\["lora"\]')


@pytest.mark.parametrize("key", ["kind", "format_version", "adapter"])
def test_damaged_description_in_a_checkpoint_is_refused(key: str):
    for value in (None, 3, "text", {"a": "b"}, "gone"):
        state = checkpoint(trained_zoo(), "merged")
        state["lora"][key] = value
        if value == "gone":
            del state["lora"][key]
        assert_refused(state)


ODD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # none of them is a dense tensor with values
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
    "on the meta device": lambda tensor: tensor.to("meta"),
    "of rank zero": lambda tensor: tensor[:0] if len(tensor) == 2 else tensor[:, :0],  # of r=2
}
QUIET = pytest.mark.filterwarnings("ignore:.*(Sparse CSR|[Nn]ested).*")


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))


def adapted(**options: Any) -> nn.Module:
    net = small()
    inject(net, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False, **options))
    return net


def odd_sources(path: Path, odd: str, names: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """An adapter with an odd tensor in every form that can hold one."""
    net = adapted(**options)
    state = adapter_state_dict(net)
    state = {**state, **{name: ODD_TENSORS[odd](state[name].detach()) for name in names}}
    peft = {f"base_model.model.{name.replace('lora_A', 'lora_A.weight')}": state[name] for name in state}
    peft = {name.replace("lora_B", "lora_B.weight"): tensor for name, tensor in peft.items()}
    trained: dict[str, Any] = {"state_dict": net.state_dict()}
    convert_checkpoint(net, trained, "adapter")
    trained["state_dict"] = {**trained["state_dict"], **{name: state[name] for name in names}}
    sources: dict[str, Any] = {"state dict": state, "checkpoint": trained, "PeftModel": {"state_dict": peft}}
    for form, content in list(sources.items()):
        torch.save(content, path / f"{form}.pt")
        sources[f"file with a {form}"] = path / f"{form}.pt"
    return sources


WHICH = {  # tensors, and the options of which they are
    "A": (["0.lora_A"], {}),
    "B": (["0.lora_B"], {}),
    "A and B": (["0.lora_A", "0.lora_B"], {}),
    "magnitude": (["0.lora_magnitude"], {"use_dora": True}),
    "whole module": (["1.weight"], {"modules_to_save": ["1"]}),
}


def goes_with(odd: str, which: str) -> bool:
    return odd != "of rank zero" or which in ("A", "B", "A and B")


@QUIET
@pytest.mark.parametrize(("odd", "which"), covering(ODD_TENSORS, WHICH, fits=goes_with))
def test_odd_tensor_is_refused_at_every_door(tmp_path: Path, odd: str, which: str):
    names, options = WHICH[which]
    for source in odd_sources(tmp_path, odd, names, options).values():
        net = adapted(**options)
        before = trace(net)
        with pytest.raises(LoRAError):
            load_adapter(net, source)
        assert trace(net) == before
        with pytest.raises(LoRAError):
            adapter_with_options(source)
        with pytest.raises(LoRAError):
            combine([source], [1])
        if isinstance(source, Path) and which != "whole module":
            with pytest.raises(LoRAError):
                info(source)
