"""A merge of files gives the bits that save_merged of the live model gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, save_merged
from lightning_lora.files.model_folder import index_of
from support.files.expected_weights import merge_and_check
from support.models.networks import checkpoint
from support.models.peers import ConvNet, Fused, seeded, spread_, tensors_of
from support.models.token_rows import ROWS
from support.models.token_rows import Net as Tables
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:merged 16-bit weights"),
    pytest.mark.filterwarnings("ignore:lightning_lora. base parameters were unfrozen"),
]


class Wide(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.linear, self.emb = nn.Linear(40, 40), nn.Linear(40, 70), nn.Embedding(60, 40)
        self.turned = transformers.pytorch_utils.Conv1D(50, 40)
        self.conv, self.grouped = nn.Conv2d(8, 12, 3), nn.Conv1d(8, 12, 3, groups=2)
        self.apart = nn.MultiheadAttention(40, 2, kdim=30, vdim=20)
        self.block = nn.ParameterDict({"experts": torch.randn(5, 30, 20), "matrix": torch.randn(30, 20)})
        self.norm = nn.LayerNorm(40)


EVERY = ["square", "linear", "emb", "turned", "conv"]
EXPERTS = ["block.experts", "block.matrix"]
OF_ATTENTION = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
# Options, and what is trained beside them: a weight that an adapter holds whole and that has factors too.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "LoRA": (Wide, {"target_modules": [*EVERY, "grouped"], "bias": "all"}, []),
    "LoRA of attention": (ConvNet, {"target_modules": ["mha"]}, []),
    "LoRA of parts": (Fused, {"target_modules": ["qkv"], "enable_lora": {"qkv": [True, False, True]}}, []),
    "DoRA": (Wide, {"target_modules": EVERY, "use_dora": True}, []),
    "LoHa": (Wide, {"target_modules": ["square", "linear", "conv"], "variant": "loha"}, []),
    "PiSSA": (Wide, {"target_modules": ["linear", "turned"], "init_lora_weights": "pissa"}, []),
    "experts": (Wide, {"target_modules": ["linear"], "target_parameters": EXPERTS}, []),
    "rows": (Tables, {"target_modules": ["body"], "trainable_token_indices": {"emb": list(ROWS)}}, []),
    "a saved module": (Wide, {"target_modules": ["linear"], "modules_to_save": ["norm", "conv"]}, []),
    "LoRA, unfrozen": (
        Wide,
        {"target_modules": [*EVERY, "grouped"], "bias": "all"},
        [f"{name}.weight" for name in (*EVERY, "grouped")],
    ),
    "attention, unfrozen": (ConvNet, {"target_modules": ["mha"]}, ["mha.in_proj_weight", "mha.out_proj.weight"]),
    "attention in parts, unfrozen": (
        Wide,
        {"target_modules": ["apart"]},
        [f"apart.{name}" for name in OF_ATTENTION],
    ),
    "turned parts, unfrozen": (
        Wide,
        {"target_modules": ["turned"], "enable_lora": {"turned": [False, True]}},
        ["turned.weight"],
    ),
    "experts, unfrozen": (Wide, {"target_modules": ["linear"], "target_parameters": EXPERTS}, EXPERTS),
    "DoRA, unfrozen": (
        Wide,
        {"target_modules": ["turned", "emb", "conv"], "use_dora": True},
        ["turned.weight", "emb.weight", "conv.weight"],
    ),
    "OLoRA, unfrozen": (Wide, {"target_modules": ["turned"], "init_lora_weights": "olora"}, ["turned.weight"]),
}


def save_in_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write every third tensor into one of three files."""
    folder.mkdir()
    files = {f"model-{i + 1:05}-of-00003.safetensors": list(tensors)[i::3] for i in range(3)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    sizes = {file: {name: tensors[name].nbytes for name in names} for file, names in files.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(sizes, {})))


FORMS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "base": tensors_of,
    "base.safetensors": load_file,
    "base.pt": torch.load,
}


@pytest.mark.parametrize(
    ("dtype", "chunk", "forms"),
    [(torch.float32, 2**17, ["base.safetensors", "base.pt"]), (torch.bfloat16, 100, ["base"])],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("case", CASES)
def test_each_form_of_base_gives_the_bits_of_save_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype, chunk: int, forms: list[str]
):
    monkeypatch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", chunk)
    build, options, unfrozen = CASES[case]
    net = seeded(build).to(dtype)
    base = {name: value.clone() for name, value in net.state_dict().items()}
    inject(net, LoRAConfig(r=4, **options))
    for name in unfrozen:
        net.get_parameter(name).requires_grad_(True)
    spread_(net)
    torch.save(checkpoint(net, "adapter"), tmp_path / "adapter.ckpt")
    save_merged(net, tmp_path / "live")
    expected = tensors_of(tmp_path / "live")
    assert any(not torch.equal(value, base[name]) for name, value in expected.items())
    save_file(base, tmp_path / "base.safetensors")
    torch.save(base, tmp_path / "base.pt")
    save_in_shards(base, tmp_path / "base")
    for form in forms:
        merge_and_check(tmp_path / form, tmp_path / "adapter.ckpt", tmp_path / f"out-{form}")
        found = FORMS[form](tmp_path / f"out-{form}")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), (form, name)
    if case != "DoRA":  # which has norms in the base's dtype
        out = tmp_path / "double.safetensors"
        merge_and_check(tmp_path / "base.safetensors", tmp_path / "adapter.ckpt", out, dtype=torch.float64)
