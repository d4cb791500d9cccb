"""Damaged and hostile sources: always a LoRAError, no code is run, and the model stays as it was."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, adapter_state_dict, combine, inject, load_adapter, save_adapter
from lightning_lora.command.info import diff, info
from lightning_lora.exchange.checkpoint_of_model import convert_checkpoint
from lightning_lora.formats.sources import adapter_with_options
from lightning_lora.nn.adapted_weights import adapted_layers
from support.models import ZOO_LAYERS, base_zoo, checkpoint, state_bits, trace, trained_zoo


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


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch"])
def test_pickled_code_does_not_run(tmp_path, form):
    path, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    content = checkpoint(trained_zoo(), "adapter")
    content["state_dict"]["extra"] = Hostile(mark)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert_refused(path, "holds objects other than plain types and tensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # it would have


def test_pickled_code_beside_the_tensors_does_not_run_and_is_passed_over(tmp_path):
    path, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save(checkpoint(trained := trained_zoo(), "adapter") | {"hyper_parameters": {"loss": Hostile(mark)}}, path)
    load_adapter(model := base_zoo(), path)
    assert state_bits(model) == state_bits(trained)
    assert not mark.exists()


def test_pickled_code_in_a_folder_does_not_run(tmp_path):
    save_adapter(trained_zoo(), tmp_path / "adapter")
    mark = tmp_path / "ran"
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(pickle.dumps(Hostile(mark)))
    assert_refused(tmp_path / "adapter", "cannot be read as safetensors")
    assert not mark.exists()


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


@pytest.mark.parametrize("key", ["kind", "format_version", "config", "layers", "fingerprint", "adapter"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": "b"}, {"conv": {"values": 3}}, "gone"])
def test_damaged_description_in_a_checkpoint_is_refused(key, value):
    for kind in ("adapter", "merged"):
        state = checkpoint(trained_zoo(), kind)
        if key == "adapter" and kind == "adapter":
            continue
        state["lora"][key] = value
        if value == "gone":
            del state["lora"][key]
        assert_refused(state)


WHOLE: dict[str, bytes] = {}


def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    if not WHOLE:
        path = tmp_path_factory.mktemp("whole")
        torch.save(checkpoint(trained_zoo(), "adapter"), path / "file.ckpt")
        save_adapter(trained_zoo(), path / "adapter")
        (path / "adapter" / "README.md").unlink()  # nothing reads the model card
        for file in [path / "file.ckpt", *(path / "adapter").iterdir()]:
            WHOLE[file.name] = file.read_bytes()
    return WHOLE


def written(files: dict[str, bytes], path: Path) -> dict[str, Path]:
    """The same files, in a folder where each stands in for the whole one."""
    (path / "adapter").mkdir(exist_ok=True)
    for name, content in files.items():
        (path / ("adapter" if name != "file.ckpt" else "") / name).write_bytes(content)
    return {name: path / ("adapter" if name != "file.ckpt" else name) for name in files}


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_truncated_or_random_file_is_refused(tmp_path, tmp_path_factory, data):
    files = dict(whole(tmp_path_factory))
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    files[name] = data.draw(
        st.integers(0, len(content.rstrip()) - 1).map(lambda end: content[:end]) | st.binary(max_size=300)
    )
    assert_refused(written(files, tmp_path)[name])


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_file_with_changed_bytes_never_leaves_a_half_loaded_model(tmp_path, tmp_path_factory, data):
    files = dict(whole(tmp_path_factory))
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    files[name] = bytes(content)
    model = base_zoo()
    before = trace(model)
    try:
        load_adapter(model, written(files, tmp_path)[name])
    except LoRAError:
        assert trace(model) == before
    else:
        # where the byte was in the options, the layers may be spelled out another way
        assert sorted(adapted_layers(model)) == sorted(ZOO_LAYERS)
        assert trace(model) != before


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


CASES = [
    (odd, which) for odd in ODD_TENSORS for which in WHICH if odd != "of rank zero" or "A" in which or "B" in which
]


@QUIET
@pytest.mark.parametrize(("odd", "which"), CASES)
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


@pytest.mark.parametrize("shape", [(0, 2), (5, 2)])
def test_info_of_a_layer_without_inputs_or_outputs_has_a_norm_of_zero(tmp_path: Path, shape: tuple[int, int]):
    factors = {"a.lora_A": torch.ones(2, 0 if shape[0] else 3), "a.lora_B": torch.ones(shape)}
    torch.save(factors, tmp_path / "a.pt")
    assert info(tmp_path / "a.pt")["layers"]["a"]["norm_delta"] == 0
    assert diff(tmp_path / "a.pt", tmp_path / "a.pt")["changes"]["a"]["change"] == 0


OPTIONS_OF_FOLDERS = (*LoRAConfig.__dataclass_fields__, "peft_type", "fan_in_fan_out", "revision")


@pytest.mark.parametrize("option", OPTIONS_OF_FOLDERS)
def test_option_of_any_type_in_a_folder_is_taken_or_refused(tmp_path: Path, option: str):
    """As PEFT writes it: one of ours has its options in the header too."""
    net = get_peft_model(small(), LoraConfig(r=2, target_modules=["0"]))
    net.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    options = json.loads(file.read_text())
    for value in (3, True, "x", [3], {"a": 1}, None, 1.5, [None], [[]]):
        file.write_text(json.dumps({**options, option: value}))
        for door in (lambda: load_adapter(small(), tmp_path), lambda: info(tmp_path)):
            with contextlib.suppress(LoRAError):
                door()


def test_target_parameters_that_are_no_list_are_refused(tmp_path: Path):
    net = get_peft_model(small(), LoraConfig(r=2, target_modules=["0"]))
    net.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": 3}))
    with pytest.raises(LoRAError, match="target_parameters must be a list of parameter names, but it is 3"):
        load_adapter(small(), tmp_path)
