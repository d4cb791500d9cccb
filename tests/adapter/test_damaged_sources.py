"""Damaged and hostile sources: always a LoRAError, no code is run, and the model stays as it was."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora import LoRAError, load_adapter, save_adapter
from lightning_lora.nn.lora_layer import adapted_layers
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
        for file in [path / "file.ckpt", *(path / "adapter").iterdir()]:
            WHOLE[file.name] = file.read_bytes()
    return WHOLE


def written(files: dict[str, bytes], path: Path) -> dict[str, Path]:
    """The same files, in a folder where each stands in for the whole one."""
    (path / "adapter").mkdir(exist_ok=True)
    for name, content in files.items():
        (path / ("adapter" if name != "file.ckpt" else "") / name).write_bytes(content)
    return {name: path / ("adapter" if name != "file.ckpt" else name) for name in files}


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
