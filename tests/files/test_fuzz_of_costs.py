"""Random files that ask for more than their size: nesting, sharing, strides, compression, names and patterns.

Each is read at each door, or refused, in two seconds and 200 MB; nothing but a LoRAError comes out.
"""

from __future__ import annotations

import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAError, load_adapter
from lightning_lora.command.info import info

EVERYDAY = int(os.environ.get("LORA_FUZZ_INPUTS", "40"))
MANY = max(400, EVERYDAY)
SECONDS, KILOBYTES = 2.0, 200 * 1024
FACTORS = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}

numbers = st.sampled_from([0, 1, 2, 9, 100, 3000, 2**20, 2**40])
texts = st.sampled_from(["a", ".", "a.", ".base_layer", "lora_A", "(", "*", "é", "\0", "0."])
names = st.builds(lambda text, times: text * min(times, 3000), texts, numbers)
pieces = st.sampled_from(
    [*"ab.|*+?()", "(?:", "[ab]", "{2}", "{1,}", r"\d", "(?=", "(?!", "$", r"\1", "(a+)+", "(a|a)*"]
)
patterns = st.builds(lambda text, times: text * min(times, 500), st.lists(pieces, min_size=1).map("".join), numbers)


@st.composite
def nested(draw: st.DrawFn) -> Any:
    """Lists, tuples and mappings inside each other, many times, each perhaps several times in the next."""
    value: Any = draw(st.none() | numbers | names)
    for _ in range(draw(st.integers(1, 4))):
        times, sharing = draw(st.sampled_from([1, 2, 30, 150])), draw(st.integers(1, 3))
        kind = draw(st.sampled_from(["list", "tuple", "mapping", "key"]))
        for _ in range(times):
            if kind == "mapping":
                value = {"a": value, "b": value}
            elif kind == "key":
                value = {value if isinstance(value, (str, int)) else "a": value}
            else:
                value = (list if kind == "list" else tuple)([value] * sharing)
    return value


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of a few numbers that says that it has others."""
    shape, strides = draw(st.lists(numbers, min_size=1, max_size=3)), draw(st.lists(st.integers(0, 2), min_size=3))
    with suppress(RuntimeError):
        return torch.ones(9000).as_strided(shape, strides[: len(shape)])
    return torch.ones(1).expand(draw(st.sampled_from([1, 4, 2**20])), draw(st.sampled_from([2, 4, 2**20])))


def described(**changed: Any) -> dict[str, Any]:
    meta = {"format_version": 1, "kind": "adapter", "config": {"r": 2}, "layers": [["Linear", 1.0, ["0"]]]}
    return meta | {"fingerprint": [], "network": "", "origin": {}} | changed


def state(name: str = "0") -> dict[str, torch.Tensor]:
    return {f"{name}.lora_{factor}": tensor for factor, tensor in FACTORS.items()}


def nesting_and_sharing(draw: st.DataObject, path: Path) -> None:
    keys = ["config", "layers", "fingerprint", "network", "origin", "kind", "format_version", "tables", "tied"]
    value, key = draw.draw(nested()), draw.draw(st.sampled_from(keys))
    options = ["r", "lora_alpha", "target_modules", "rank_pattern", "bias", "modules_to_save", "layers_pattern"]
    changed = {"config": {draw.draw(st.sampled_from(options)): value}} if key == "config" else {key: value}
    torch.save({"state_dict": state(), "lora": described(**changed), "hyper_parameters": {"x": value}}, path)


def strides(draw: st.DataObject, path: Path) -> None:
    tensors = state() | {draw.draw(st.sampled_from([*state(), "b", "0.bias"])): draw.draw(strided())}
    torch.save(draw.draw(st.sampled_from([tensors, {"state_dict": tensors, "lora": described()}])), path)


def compression(draw: st.DataObject, path: Path) -> None:
    torch.save(state() | {"a": torch.zeros(draw.draw(st.sampled_from([1, 2**20, 2**23])))}, path)
    with zipfile.ZipFile(path) as archive:
        records = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content, draw.draw(st.sampled_from([0, 8, 12, 14])))


def long_names(draw: st.DataObject, path: Path) -> None:
    form, name = draw.draw(st.sampled_from(["checkpoint", "state dict", "peft", "described"])), draw.draw(names)
    if form == "peft":
        keys = [f"base_model.model.{name}.lora_{factor}.weight" for factor in FACTORS]
        torch.save(dict(zip(keys, FACTORS.values(), strict=True)), path)
    elif form == "state dict":
        torch.save(state(name), path)
    else:
        layers = [["Linear", 1.0, [name if form == "described" else "0"]]]
        torch.save({"state_dict": state(name), "lora": described(layers=layers)}, path)


def options_of_folders(draw: st.DataObject, path: Path) -> None:
    path.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{draw.draw(st.just('0') | names)}.lora_{n}.weight": t for n, t in FACTORS.items()}
    with suppress(Exception):  # safetensors takes no name with a lone surrogate
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    option, pattern = (
        draw.draw(st.sampled_from(["target_modules", "rank_pattern", "alpha_pattern"])),
        draw.draw(patterns),
    )
    many = draw.draw(st.sampled_from([0, 0, 1000, 100_000]))
    listed = [pattern, *(f"a{i}" for i in range(many))]
    value = dict.fromkeys(listed, 2) if option.endswith("pattern") else draw.draw(st.sampled_from([pattern, listed]))
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["0"], option: value}
    (path / "adapter_config.json").write_text(json.dumps(config))


KINDS = [nesting_and_sharing, strides, compression, long_names, options_of_folders]
kinds = pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:lightning_lora. adapter. it has no tensors for")  # by odd options


def highest_use() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def try_inputs(folder: Path, write: Callable[[st.DataObject, Path], None], inputs: int) -> None:
    @settings(max_examples=inputs, suppress_health_check=list(HealthCheck))
    @given(draw=st.data())
    def each(draw: st.DataObject) -> None:
        path = folder / ("adapter" if write is options_of_folders else "a.ckpt")
        write(draw, path)
        for door in (lambda: load_adapter(nn.Sequential(nn.Linear(4, 4)), path), lambda: info(path)):
            Path("/proc/self/clear_refs").write_text("5")  # the highest use so far is what is in use now
            before, started = highest_use(), time.process_time()
            with suppress(LoRAError):
                door()
            assert time.process_time() - started < SECONDS
            assert highest_use() - before < KILOBYTES

    each()


@pytest.mark.slow
@kinds
def test_file_that_asks_for_much_is_refused_or_read_at_little_cost(tmp_path: Path, write: Any):
    try_inputs(tmp_path, write, EVERYDAY)


@pytest.mark.slow
@kinds
def test_many_files_that_ask_for_much_are_refused_or_read_at_little_cost(tmp_path: Path, write: Any):
    try_inputs(tmp_path, write, MANY)
