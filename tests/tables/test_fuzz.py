"""Random damage to adapter folders, checkpoints, indexes and weights: our error or the right result, nothing else.

Right is what the damaged file says to other libraries, see fuzz_reference.py.

After each input: no other exception, the model as it was where loading failed, every file as it was, and nothing
new but a complete result. The number of inputs is printed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError, adapter_state_dict, inject, load_adapter, save_adapter
from lightning_lora.command.info import diff, info
from support.files.expected_weights import merge_and_check
from support.files.fuzz_reference import (
    Source,
    assert_changes,
    assert_loaded,
    assert_merged,
    assert_others_kept,
    weights_in,
)
from support.models.networks import Zoo, checkpoint, trace, zoo_config

INPUTS = int(os.environ.get("LORA_FUZZ_INPUTS", "40"))  # of each kind; always the same ones, of which more are more
INDEX = "model.safetensors.index.json"
tried: Counter[str] = Counter()
refused: Counter[str] = Counter()
fuzz = settings(max_examples=INPUTS, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    tried.clear()
    refused.clear()
    yield
    for kind, count in tried.items():
        record_property("inputs", (kind, count, refused[kind]))  # conftest.py prints their sum


def zoo() -> Zoo:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Zoo()


# No value is a default, so that one that is passed over shows.
OPTIONS = {
    "init_lora_weights": False,
    "lora_alpha": 3,
    "lora_dropout": 0.25,
    "rank_pattern": {"conv": 3},
    "alpha_pattern": {"body.3": 5, "conv": 7},
}


def trained() -> Zoo:
    """With a value of its own in everything that training changes."""
    net = zoo()
    inject(net, zoo_config(**OPTIONS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in adapter_state_dict(net).values():
            tensor += torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else 3
    return net


@cache
def undamaged() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All of the base, and what training changed."""
    return zoo().state_dict(), adapter_state_dict(trained())


def source(path: Path) -> Source:
    return Source(path, undamaged()[1])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each: PEFT folder with and without our header, checkpoint, state dict, and a sharded base."""
    path = tmp_path_factory.mktemp("good")
    net = trained()
    save_adapter(net, path / "ours")
    shutil.copytree(path / "ours", path / "foreign")
    save_file(load_file(path / "ours" / "adapter_model.safetensors"), path / "foreign" / "adapter_model.safetensors")
    torch.save(checkpoint(net, "adapter"), path / "adapter.ckpt")
    (path / "base").mkdir()
    state = dict(zoo().state_dict())
    torch.save({"state_dict": state, "epoch": 1}, path / "base.ckpt")
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, path / "base" / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (path / "base" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (path / "base" / "config.json").write_text(json.dumps({"dtype": "float32", "vocab_size": 11}))
    return path


def contents(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def put_back(path: Path, before: dict[str, bytes | None]) -> None:
    """Make a folder hold what it held."""
    after = contents(path)
    for name in reversed(after):
        if name not in before:
            (path / name).rmdir() if after[name] is None else (path / name).unlink()
    for name, content in before.items():
        if content is not None and after.get(name) != content:
            (path / name).write_bytes(content)


def attempt(kind: str, good: Path, spoil: Callable[[Path], Any], act: Callable[[Path], Any]) -> None:
    """Act on a spoiled copy; only LoRAError may come out of it, and only `out*` may be new."""
    tried[kind] += 1
    outside = good.with_name("outside")
    path = outside / "inside"
    if not path.exists():
        shutil.copytree(good, path)
    whole = contents(outside)
    try:
        spoil(path)
        before = contents(outside)
        message = ""
        try:
            act(path)
        except LoRAError as error:
            message = str(error)
        failed = bool(message)
        refused[kind] += failed
        assert len(message) < 2000
        after = contents(outside)
        new = set(after) - set(before)
        assert all(after[file] == before[file] for file in before)
        assert all(file.startswith("inside/out") for file in new)
        assert not (failed and new)
    finally:
        put_back(outside, whole)


def load(name: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        net = zoo()
        before = trace(net)
        try:
            info(path / name)
            load_adapter(net, path / name)
        except LoRAError:
            assert trace(net) == before
            raise
        assert_loaded(net, undamaged()[0], source(path / name))

    return act


def merge(base: str, adapter: str, output: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        found = info(path / base)
        merge_and_check(path / base, path / adapter, path / output)
        weights = weights_in(path / base)
        if found["kind"] == "weights":  # and not what a name makes it look like
            assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
        assert_merged(weights, source(path / adapter), weights_in(path / output))
        assert_others_kept(path / base, path / output)

    return act


def compare(first: str, second: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        assert_changes(diff(path / first, path / second), source(path / first), source(path / second))

    return act


# --- damage to bytes ---


@st.composite
def byte_damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "overwrite"]))
    place, size = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 64))
    near_the_start = draw(st.booleans())
    data = draw(st.binary(min_size=1, max_size=16))

    def damage(content: bytes) -> bytes:
        at = int(place * min(len(content), 4000 if near_the_start else len(content)))
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (data[0] or 1)]) + content[at + 1 :] if content else data
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + data + content[at:]
        if kind == "repeat":
            return content[: at + size] + content[at:]
        return content[:at] + data + content[at + len(data) :]

    return damage


def damaged(file: str, damage: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: (path / file).write_bytes(damage((path / file).read_bytes()))


@pytest.mark.slow
@fuzz
@given(
    damage=byte_damage(),
    folder=st.sampled_from(["ours", "foreign"]),
    file=st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]),
)
def test_adapter_folder_with_damaged_bytes_is_refused_or_loads_right(
    good: Path, damage: Callable[[bytes], bytes], folder: str, file: str
):
    attempt("bytes of adapter folders", good, damaged(f"{folder}/{file}", damage), load(folder))


# --- damage to values: valid JSON and valid pickles that say something odd ---

strings = ["", "r", "(", "../../x", "/etc/passwd", "conv", "head", "float32", "torch", ".*", "\0", "é" * 9]
leaf = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([2**63, 10**400, -(10**30)])
    | st.floats()
    | st.sampled_from(strings)
)
odd = (
    leaf
    | st.lists(leaf, max_size=3)
    | st.dictionaries(st.text(max_size=6) | st.sampled_from(strings), leaf, max_size=3)
)


@st.composite
def value_damage(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Replaces, removes, adds or renames a value somewhere inside nested dictionaries and lists."""
    steps = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5))
    kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
    value, key = draw(odd), draw(st.sampled_from(["r", "use_dora", "new", "lora_alpha", "conv", "weight_map", "../x"]))

    def damage(content: Any) -> Any:
        root = content = copy.deepcopy(content)
        parent: Any = None
        at: Any = None
        for step in steps:
            if not isinstance(content, (dict, list)) or not content:
                break
            places = list(content) if isinstance(content, dict) else list(range(len(content)))
            parent, at = content, places[int(step * len(places))]
            content = content[at]
        if parent is None:
            return value
        if kind == "remove":
            del parent[at]
        elif kind == "add" and isinstance(parent, dict):
            parent[key] = value
        elif kind == "rename" and isinstance(parent, dict):
            parent[key] = parent.pop(at)
        else:
            parent[at] = value
        return root

    return damage


def json_damaged(file: str, damage: Callable[[Any], Any]) -> Callable[[Path], Any]:
    return lambda path: (path / file).write_text(json.dumps(damage(json.loads((path / file).read_text()))))


def header_damaged(file: str, damage: Callable[[Any], Any], inside: bool) -> Callable[[Path], Any]:
    """Damage to a safetensors header, or to our description inside it."""

    def spoil(path: Path) -> None:
        content = (path / file).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        if inside:
            metadata = header["__metadata__"]
            metadata["lightning_lora"] = json.dumps(damage(json.loads(metadata["lightning_lora"])))
        else:
            header = damage(header)
        text = json.dumps(header).encode()
        (path / file).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return spoil


@pytest.mark.slow
@fuzz
@given(damage=value_damage(), where=st.sampled_from(["ours", "foreign", "header", "description"]))
def test_adapter_folder_with_damaged_values_is_refused_or_loads_right(
    good: Path, damage: Callable[[Any], Any], where: str
):
    if where in ("ours", "foreign"):
        spoil = json_damaged(f"{where}/adapter_config.json", damage)
    else:
        spoil = header_damaged("ours/adapter_model.safetensors", damage, inside=where == "description")
    attempt("values of adapter folders", good, spoil, load("foreign" if where == "foreign" else "ours"))


def values_of_checkpoint(damage: Callable[[Any], Any], where: str) -> Callable[[Path], Any]:
    def spoil(path: Path) -> None:
        content = torch.load(path / "adapter.ckpt", weights_only=True)
        content = damage(content) if where == "all" else content | {where: damage(content[where])}
        torch.save(content, path / "adapter.ckpt")

    return spoil


@pytest.mark.slow
@fuzz
@given(
    spoil=byte_damage().map(partial(damaged, "adapter.ckpt"))
    | st.builds(values_of_checkpoint, value_damage(), st.sampled_from(["lora", "all", "state_dict"]))
)
def test_damaged_checkpoint_is_refused_or_loads_right(good: Path, spoil: Callable[[Path], Any]):
    attempt("checkpoints", good, spoil, load("adapter.ckpt"))


@pytest.mark.slow
@fuzz
@given(
    spoil=st.builds(damaged, st.sampled_from(["base/model-1.safetensors", f"base/{INDEX}"]), byte_damage())
    | st.builds(json_damaged, st.sampled_from([f"base/{INDEX}", "base/config.json"]), value_damage())
)
def test_damaged_model_folder_is_refused_or_merges_right(good: Path, spoil: Callable[[Path], Any]):
    attempt("model folders", good, spoil, merge("base", "ours", "out"))


# --- damage to tensors ---

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])


@st.composite
def tensor_damage(draw: st.DrawFn) -> Callable[[dict[str, torch.Tensor]], None]:
    place, kind = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 5))
    shape, dtype = draw(st.lists(st.integers(0, 9), max_size=4)), draw(dtypes)
    value = draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0]))
    names = ["conv.lora_A", "x.lora_A.weight", "base_model.model.lora_A.weight", "head.weight", ""]
    name = draw(st.sampled_from(names))

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        key = sorted(tensors)[int(place * len(tensors))]
        if kind == 0:
            tensors[key] = torch.zeros(shape, dtype=torch.float32).to(dtype)
        elif kind == 1:
            tensors[key] = tensors[key].to(dtype)
        elif kind == 2:
            tensors[name] = tensors.pop(key)
        elif kind == 3:
            del tensors[key]
        elif kind == 4 and tensors[key].numel():
            tensors[key].view(-1)[-1] = value if tensors[key].is_floating_point() else 1
        else:
            tensors[name] = tensors[key].clone()

    return damage


@pytest.mark.slow
@fuzz
@given(
    damage=tensor_damage(), folder=st.sampled_from(["ours", "foreign"]), to=st.sampled_from(["load", "merge", "diff"])
)
def test_adapter_folder_with_damaged_tensors_is_refused_or_handled_right(
    good: Path, damage: Callable[[dict[str, torch.Tensor]], None], folder: str, to: str
):
    def spoil(path: Path) -> None:
        with safe_open(path / folder / "adapter_model.safetensors", "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        damage(tensors)
        save_file(tensors, path / folder / "adapter_model.safetensors", metadata)

    acts = {
        "load": load(folder),
        "merge": merge("base", folder, "out"),
        "diff": compare(folder, "ours" if folder == "foreign" else "foreign"),
    }
    attempt(f"tensors, to {to}", good, spoil, acts[to])


def tensors_of_base(damage: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], Any]:
    def spoil(path: Path) -> None:
        content = torch.load(path / "base.ckpt", weights_only=True)
        damage(content["state_dict"])
        torch.save(content, path / "base.ckpt")

    return spoil


@pytest.mark.slow
@fuzz
@given(spoil=byte_damage().map(partial(damaged, "base.ckpt")) | tensor_damage().map(tensors_of_base))
def test_damaged_base_checkpoint_is_refused_or_merges_right(good: Path, spoil: Callable[[Path], Any]):
    attempt("base checkpoints", good, spoil, merge("base.ckpt", "ours", "out.ckpt"))
