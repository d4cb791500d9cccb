"""Damaged and malicious files: a clear error, nothing half loaded, nothing written elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAError, adapter_state_dict, inject, load_adapter, save_adapter
from lightning_lora.command.merge import merge_on_disk
from lightning_lora.formats.peft_names import read_names
from support.covering import covering
from support.models.networks import Zoo, state_bits, trace, zoo_config
from support.models.peers import edit, model, ours, redescribe
from support.runs.notices import quiet_peers

pytestmark = quiet_peers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


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


@pytest.mark.parametrize("where", ["adapter.bin", "base"])
def test_pickled_code_in_an_adapter_or_base_is_not_run(tmp_path, base: Path, where: str):
    trap = tmp_path / "harmed"
    torch.save({"state_dict": {"a.lora_A": torch.zeros(2, 2), "x": Harm(trap)}}, tmp_path / "bad.ckpt")
    if where == "adapter.bin":
        (tmp_path / "adapter" / TENSORS).unlink()
        shutil.copy(tmp_path / "bad.ckpt", tmp_path / "adapter" / "adapter_model.bin")
    doors: dict[str, Callable[[], Any]] = {
        "adapter.bin": lambda: load_adapter(model("llama"), tmp_path / "adapter"),
        "base": lambda: merge_on_disk(tmp_path / "bad.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt"),
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


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


SPOILED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "NaN": (r"'conv\.lora_B' holds NaN or Inf", lambda t: t[B].view(-1)[3:4].fill_(float("nan"))),
    "Inf": (r"'conv\.lora_A' holds NaN or Inf", lambda t: t[A].view(-1)[3:4].fill_(float("-inf"))),
    "whole numbers": (r"'conv\.lora_A' must be a floating point tensor", lambda t: t.update({A: t[A].long()})),
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


@pytest.mark.parametrize(("case", "header"), covering(SPOILED, ["our header", "peft's names alone"], meet=1))
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
    ("r", 0), ("r", 2.5), ("r", "x"), ("r", True), ("r", 10**400), ("r", 3), ("lora_alpha", float("nan")),
    ("lora_alpha", 0), ("lora_dropout", 1), ("bias", "some"), ("use_rslora", 1), ("target_modules", "("),
    ("target_modules", 5), ("target_modules", [1]), ("rank_pattern", [1]), ("rank_pattern", {"(": 1}),
    ("alpha_pattern", {"0": float("nan")}), ("modules_to_save", "x"), ("peft_type", "IA3"), ("peft_type", ["LORA"]),
    ("exclude_modules", 3), ("target_parameters", 3),
]  # fmt: skip


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4))


@pytest.fixture
def by_peft(tmp_path: Path) -> Path:
    peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "a")  # type: ignore[arg-type]
    return tmp_path / "a"


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_peft_option_with_a_bad_value_is_refused_by_name(by_peft: Path, option: str, value: Any):
    edit(by_peft, **{option: value})
    fresh = plain()
    before = trace(fresh)
    with pytest.raises(LoRAError, match=option):
        load_adapter(fresh, by_peft)
    assert trace(fresh) == before


@pytest.mark.parametrize("content", ["[]", "{", "\udcff", '{"a":' * 10_000, ""])
def test_adapter_config_that_is_not_a_json_object_is_refused(by_peft: Path, content: str):
    (by_peft / CONFIG).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LoRAError, match=CONFIG):
        load_adapter(plain(), by_peft)


def prints(name: str = "norm.weight", **changed: Any) -> dict[str, Any]:
    """The fingerprint of one tensor as files hold it, with some of its parts changed."""
    parts = {"dtype": "float32", "shape": [8], "values": 8 * [0.5], **changed}
    return {name: list(parts.values())}


FORMS = ["folder", "checkpoint"]


DESCRIPTIONS: list[tuple[str, Any]] = [
    ("config", None), ("config", {"r": -1}), ("config", {"unknown": 1}), ("config", [1]),
    ("layers", 3), ("layers", []), ("layers", [3]), ("layers", [["Linear", 2.0]]),
    ("layers", [["Linear", 1.0, ["conv", "nowhere"]]]), ("layers", lambda own: [["Nothing", *own[0][1:]], *own[1:]]),
    ("layers", [["Conv", "x", ["conv"]]]), ("layers", [["Conv", 10**400, ["conv"]]]), ("layers", [["Conv", 1.0, [1]]]),
    ("layers", [["Linear", 1.0, ["conv"]]]),
    ("fingerprint", 3), ("fingerprint", {"norm.weight": 3}), ("fingerprint", {"norm.weight": ["float32", [8]]}),
    ("fingerprint", prints(dtype="nn")), ("fingerprint", prints(shape=[-8])), ("fingerprint", prints(shape=[4])),
    ("fingerprint", prints(values=3)), ("fingerprint", prints(values=7 * [0.5])),
    ("fingerprint", prints(values=8 * ["0"])), ("fingerprint", prints(quantized=3)),
    ("fingerprint", prints(quantized="nf4", more=1)), ("network", 3), ("origin", 3),
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
        redescribe(source, **{key: value})
    else:
        source = path / "a.ckpt"
        meta = {"kind": "adapter", **description, key: value}
        names = read_names(list(tensors), source).ours
        torch.save({"state_dict": {names[n]: t for n, t in tensors.items()}, "lora": meta}, source)
    fresh = zoo()
    before = trace(fresh)
    with pytest.raises(LoRAError) as refused:
        load_adapter(fresh, source)
    assert trace(fresh) == before
    return str(refused.value)


@pytest.mark.parametrize(("number", "form"), covering(range(len(DESCRIPTIONS)), FORMS, meet=1))
def test_damaged_description_beside_the_tensors_is_refused(tmp_path, number: int, form: str):
    """Our own notes beside the tensors are read as carefully as everything else."""
    assert number or "values of 'norm.weight'" in refusal(tmp_path / "whole", form, "fingerprint", prints())
    reasons = r"description is damaged|it was cut|the options say|LoRAConfig: |was a Linear layer"
    assert re.search(reasons, refusal(tmp_path, form, *DESCRIPTIONS[number]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("number", "remedy"), [(1, "adapter_state_dict"), (99, "update"), ("x", "damaged")])
def test_a_file_of_another_format_is_refused_by_its_number_with_the_way(tmp_path, form: str, number: Any, remedy: str):
    """An earlier form once was a damaged file with an AttributeError."""
    said = refusal(tmp_path, form, "format_version", number)
    assert re.search(rf"format (is )?{number!r}", said)
    assert remedy in said


def test_the_tensors_alone_of_an_earlier_format_are_loaded_onto_an_injected_model(tmp_path):
    inject(net := zoo(), zoo_config(init_lora_weights=False))
    torch.save(adapter_state_dict(net), tmp_path / "tensors.pt")
    inject(fresh := zoo(), zoo_config())
    load_adapter(fresh, tmp_path / "tensors.pt")
    assert state_bits(fresh) == state_bits(net)
