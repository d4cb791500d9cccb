"""Damaged and malicious files: a clear error, nothing half loaded, nothing written elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAError, inject, load_adapter, save_adapter
from lightning_lora.command.info import info
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.formats.peft_names import read_names
from support.models import Zoo, trace, zoo_config
from support.notices import quiet_peers
from support.peers import model, ours, theirs

pytestmark = quiet_peers

CONFIG, TENSORS, INDEX = "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model("llama").save_pretrained(tmp_path / "base", max_shard_size="12KB")
    ours("llama", tmp_path / "adapter")
    return tmp_path / "base"


class Harm:
    """Unpickling runs a command that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("where", ["adapter", "adapter.bin", "base", "info"])
def test_pickled_code_in_an_adapter_or_base_is_not_run(tmp_path, base: Path, where: str):
    trap = tmp_path / "harmed"
    torch.save({"state_dict": {"a.lora_A": torch.zeros(2, 2), "x": Harm(trap)}}, tmp_path / "bad.ckpt")
    if where == "adapter.bin":
        (tmp_path / "adapter" / TENSORS).unlink()
        shutil.copy(tmp_path / "bad.ckpt", tmp_path / "adapter" / "adapter_model.bin")
    doors: dict[str, Callable[[], Any]] = {
        "adapter": lambda: load_adapter(model("llama"), tmp_path / "bad.ckpt"),
        "adapter.bin": lambda: load_adapter(model("llama"), tmp_path / "adapter"),
        "base": lambda: merge_on_disk(tmp_path / "bad.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt"),
        "info": lambda: info(tmp_path / "bad.ckpt"),
    }
    with pytest.raises(LoRAError, match="objects other than plain types and tensors"):
        doors[where]()
    assert not trap.exists()


def spoiled(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of an adapter folder and keep its header."""
    with safe_open(path / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    change(tensors)
    save_file(tensors, path / TENSORS, metadata)


ROOT = "base_model.model."

A, B = f"{ROOT}conv.lora_A.weight", f"{ROOT}conv.lora_B.weight"

HEAD = f"{ROOT}head.weight"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


SPOILED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "NaN": (r"'conv\.lora_B' holds NaN or Inf", lambda t: t[B].view(-1)[3:4].fill_(float("nan"))),
    "Inf": (r"'conv\.lora_A' holds NaN or Inf", lambda t: t[A].view(-1)[3:4].fill_(float("-inf"))),
    "NaN beside": (r"'head\.weight' holds NaN", lambda t: t[HEAD].fill_(float("nan"))),
    "whole numbers": (r"'conv\.lora_A' must be a floating point tensor", lambda t: t.update({A: t[A].long()})),
    "whole numbers beside": (r"'head\.weight' must be torch\.float32", lambda t: t.update({HEAD: t[HEAD].long()})),
    "no B": (r"'conv\.lora_B' is missing", lambda t: t.pop(B)),
    "no A": (r"'conv' is missing|'conv\.lora_B' has no place|'conv\.lora_A' is missing", lambda t: t.pop(A)),
    "another rank": (r"say r=2, but .* rank 3", lambda t: t.update({A: zeros(3, 8, 3), B: zeros(8, 3, 1)})),
    "two ranks": (r"A \(3, 8, 3\) and B \(8, 2, 1\) do not share a rank", lambda t: t.update({A: zeros(3, 8, 3)})),
    "another width": (r"'conv\.lora_A' must have shape \(2, 8, 3\), but has", lambda t: t.update({A: zeros(2, 9, 3)})),
    "rank 0": (r"do not share a rank", lambda t: t.update({A: zeros(0, 8, 3), B: zeros(8, 0, 1)})),
    "a vector": (r"A \(2,\) and B .* are no pair", lambda t: t.update({A: zeros(2)})),
    "one too many": (r"'nowhere\.weight'", lambda t: t.update({f"{ROOT}nowhere.weight": zeros(2)})),
    "a layer too many": (
        r"'nowhere'",
        lambda t: t.update({f"{ROOT}nowhere.lora_A.weight": zeros(2, 3), f"{ROOT}nowhere.lora_B.weight": zeros(3, 2)}),
    ),
    "an empty name": ("the name of a tensor is empty", lambda t: t.update({"": zeros(3, 8)})),
    "one name twice": (r"both mean 'head\.weight'", lambda t: t.update({"head.weight": zeros(3, 8)})),
    "no layer": (r"names no layer", lambda t: t.update({f"{ROOT}lora_A.weight": zeros(2, 2)})),
    "no factors": (r"no lora_A|is missing", lambda t: [t.pop(name) for name in list(t) if "lora_" in name]),
}


def zoo() -> Zoo:
    """Always with the same weights."""
    torch.manual_seed(1)
    return Zoo()


@pytest.mark.parametrize("header", ["our header", "peft's names alone"])
@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_adapter_leaves_the_model_alone(tmp_path, case: str, header: str):
    message, change = SPOILED[case]
    net = zoo()
    inject(net, zoo_config(init_lora_weights=False))
    save_adapter(net, tmp_path)
    spoiled(tmp_path, change)
    if header != "our header":
        save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)
    fresh = zoo()
    before = trace(fresh)
    with pytest.raises(LoRAError, match=message):
        load_adapter(fresh, tmp_path)
    assert trace(fresh) == before


BAD_OPTIONS: list[tuple[str, Any]] = [
    ("r", 0), ("r", -1), ("r", 2.5), ("r", "x"), ("r", True), ("r", 10**400), ("r", [8]), ("r", 3),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", 0), ("lora_alpha", "8"),
    ("lora_dropout", 1), ("lora_dropout", None), ("bias", "some"), ("bias", 3), ("use_rslora", 1),
    ("target_modules", "("), ("target_modules", 5), ("target_modules", [1]), ("target_modules", {"a": 1}),
    ("rank_pattern", [1]), ("rank_pattern", {"(": 1}), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q": "x"}),
    ("alpha_pattern", {"q_proj": float("nan")}), ("alpha_pattern", 7), ("modules_to_save", "x"), ("modules_to_save", 3),
    ("peft_type", "IA3"), ("peft_type", None), ("peft_type", ["LORA"]), ("exclude_modules", 3),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_peft_option_with_a_bad_value_is_refused_by_name(tmp_path, option: str, value: Any):
    theirs("llama", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {option: value}))
    fresh = model("llama")
    before = trace(fresh)
    if option == "lora_dropout" and value is None:
        load_adapter(fresh, tmp_path)
        return
    with pytest.raises(LoRAError, match=option if option != "r" else "r"):
        load_adapter(fresh, tmp_path)
    assert trace(fresh) == before


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"peft_type": "LORA"', "\udcff", '{"a":' * 10_000, ""])
def test_adapter_config_that_is_not_a_json_object_is_refused(tmp_path, content: str):
    theirs("llama", tmp_path)
    (tmp_path / CONFIG).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LoRAError, match=CONFIG):
        load_adapter(model("llama"), tmp_path)


def prints(name: str = "norm.weight", **changed: Any) -> dict[str, Any]:
    """The fingerprint of one tensor as files hold it, with some of its parts changed."""
    parts = {"dtype": "float32", "shape": [8], "values": 8 * [0.5], **changed}
    return {name: list(parts.values())}


forms = pytest.mark.parametrize("form", ["folder", "checkpoint"])


@forms
def test_undamaged_fingerprint_is_compared_with_the_base(tmp_path, form: str):
    """What is damaged below is read where it is whole."""
    assert "another base: values of 'norm.weight'" in refusal(tmp_path, form, "fingerprint", prints())


DESCRIPTIONS: list[tuple[str, Any]] = [
    ("config", None), ("config", {"r": -1}), ("config", {"unknown": 1}), ("config", [1]),
    ("layers", 3), ("layers", []), ("layers", {}), ("layers", [3]), ("layers", [["Linear", 2.0]]),
    ("layers", [["Linear", 1.0, ["conv", "nowhere"]]]), ("layers", lambda own: [["Nothing", *own[0][1:]], *own[1:]]),
    ("layers", [[["Linear"], 1.0, ["conv"]]]), ("layers", [["Conv", "x", ["conv"]]]),
    ("layers", [["Conv", 1.0, "conv"]]), ("layers", [["Conv", 10**400, ["conv"]]]), ("layers", [["Conv", 1.0, [1]]]),
    ("layers", [["Conv", None, ["conv"]]]), ("layers", [[None, 99.0, ["conv"]]]),
    ("layers", [["Linear", 1.0, ["conv"]]]),
    ("fingerprint", 3), ("fingerprint", {"norm.weight": 3}), ("fingerprint", [3]), ("fingerprint", [["float32", [8]]]),
    ("fingerprint", {"norm.weight": ["float32", [8]]}), ("fingerprint", prints(dtype="nn")),
    ("fingerprint", prints(dtype=3)), ("fingerprint", prints(shape="8")), ("fingerprint", prints(shape=[-8])),
    ("fingerprint", prints(shape=[8.0])), ("fingerprint", prints(shape=[4])), ("fingerprint", prints(shape=8)),
    ("fingerprint", prints(values=3)), ("fingerprint", prints(values=7 * [0.5])),
    ("fingerprint", prints(values=8 * ["0"])), ("fingerprint", prints(values=8 * [True])),
    ("fingerprint", prints(values="0" * 8)), ("fingerprint", prints(quantised=3)),
    ("fingerprint", prints(quantised="nf4", more=1)),
    ("network", 3), ("origin", 3), ("origin", {"a": 1}),
]  # fmt: skip


def refusal(path: Path, form: str, key: str, value: Any) -> str:
    """What load_adapter says of an adapter with another description; the model is as it was."""
    net = zoo()
    inject(net, zoo_config(init_lora_weights=False))
    save_adapter(net, path / "folder")
    tensors = load_file(path / "folder" / TENSORS)
    with safe_open(path / "folder" / TENSORS, "pt") as file:
        description = json.loads(file.metadata()["lightning_lora"])
    value = value(description[key]) if callable(value) else value
    source = path / "folder"
    if form == "folder":
        save_file(tensors, source / TENSORS, {"lightning_lora": json.dumps(description | {key: value})})
    else:
        source = path / "a.ckpt"
        meta = {"format_version": 1, "kind": "adapter", **description, key: value}
        names = read_names(list(tensors), source).ours
        torch.save({"state_dict": {names[n]: t for n, t in tensors.items()}, "lora": meta}, source)
    fresh = zoo()
    before = trace(fresh)
    with pytest.raises(LoRAError) as refused:
        load_adapter(fresh, source)
    assert trace(fresh) == before
    return str(refused.value)


@pytest.mark.parametrize("number", range(len(DESCRIPTIONS)))
@forms
def test_damaged_description_beside_the_tensors_is_refused(tmp_path, form: str, number: int):
    """Our own notes beside the tensors are read as carefully as everything else."""
    reasons = r"description is damaged|it was cut|the options say|LoRAConfig: |was a Linear layer"
    assert re.search(reasons, refusal(tmp_path, form, *DESCRIPTIONS[number]))
