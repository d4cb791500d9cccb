"""Folders for vLLM, checked by its documented rules for names and options. vLLM itself is not run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, export_adapter, inject, save_adapter, take_adapter
from lightning_lora.nn.adapted_weights import adapted_layers
from support.notices import quiet_peers
from support.peers import TENSORS, Fused, close, config_of, fill_, ours, seeded

pytestmark = quiet_peers


def vllm_scaling(path: Path, vocabulary: set[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """vLLM's rules for a folder, from its vllm/lora/peft_helper.py, lora_model.py and utils.py; vLLM itself is not run.

    Returns each module's A, B and scaling as vLLM would use them.
    """
    options = config_of(path)
    assert {"r", "lora_alpha", "target_modules"} <= options.keys()
    assert not options.get("modules_to_save")
    assert not options.get("use_dora")
    assert options.get("bias", "none") == "none"
    root = math.sqrt(options["r"]) if options.get("use_rslora") else options["r"]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path / TENSORS).items():
        assert name.startswith("base_model.model.")
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, leaf = ".".join(parts[2:-2]), parts[-2]
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B"), f"{name} is unsupported LoRA weight"
            module, leaf = ".".join(parts[2:-1]), parts[-1].replace("embedding_", "")
        assert module.rpartition(".")[2] in vocabulary, module
        found.setdefault(module, {})[leaf] = tensor
    return {n: (f["lora_A"], f["lora_B"], options["lora_alpha"] / root) for n, f in found.items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"rank_pattern": None, "alpha_pattern": None}),
        ("llama", {"rank_pattern": None, "alpha_pattern": None, "target_modules": "all-linear", "use_rslora": True}),
        ("llama-embedding", {"bias": "none"}),
        ("mixtral", {}),
    ],
)
def test_peft_folder_keeps_to_the_rules_of_vllm(tmp_path, name: str, options: dict[str, Any]):
    net = ours(name, tmp_path, **options)
    linear = {key.rpartition(".")[2] for key, module in net.named_modules() if isinstance(module, nn.Linear)}
    modules = vllm_scaling(tmp_path, linear | {"embed_tokens"})
    for key, layer in adapted_layers(net).items():
        a, b, scaling = modules.pop(key)
        torch.testing.assert_close(b @ a * scaling, layer.lora_B @ layer.lora_A * layer.lora.spec.scaling)
    assert not modules


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_plain_folder_keeps_to_the_rules_of_vllm_whatever_the_patterns(tmp_path, options: dict[str, Any]):
    """Those of versions that know no patterns: one r and one lora_alpha for all layers."""
    net = ours("llama", **options)
    export_adapter(adapter := take_adapter(net), tmp_path, plain=True)
    modules = vllm_scaling(tmp_path, {"q_proj", "v_proj", "down_proj"})
    for key, layer in adapted_layers(net).items():
        a, b, scaling = modules.pop(key)
        factors = adapter.effective_factors(key)
        assert scaling == 1
        torch.testing.assert_close(b @ a, factors.b @ factors.a * layer.lora.spec.scaling, rtol=1e-5, atol=1e-6)
    assert not modules


def test_vllm_reads_a_fused_adapter_with_one_rank_and_alpha(tmp_path):
    net = seeded(Fused)
    inject(net, LoRAConfig(r=2, lora_alpha=3, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))
    save_adapter(fill_(net), tmp_path)
    (a, b, scaling) = vllm_scaling(tmp_path, {"qkv"})["qkv"]
    x = torch.randn(3, 6)
    close(seeded(Fused).qkv(x) + x @ a.T @ b.T * scaling, net.qkv(x))
