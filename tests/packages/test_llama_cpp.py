"""What llama.cpp's own converter makes of adapters and of merged models.

LLAMA_CPP in the environment names a checkout of llama.cpp, as the source distribution of llama-cpp-python has one.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, export_adapter, inject, merged_state_dict, save_adapter, take_adapter
from support.models.peers import PEERS, SMALL, TENSORS, edit, seeded, spread_
from support.runs.notices import quiet_peers

PLACE = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.packages,
    pytest.mark.skipif(not PLACE, reason="LLAMA_CPP names no checkout of llama.cpp"),
    *quiet_peers,
]
Tensors = dict[str, torch.Tensor]


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, pad_token_id=0, **options))


def grouped_llama() -> nn.Module:
    return llama(num_key_value_heads=2)


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


@dataclass(frozen=True)
class Form:
    """An adapter, and what comes of it.

    Attributes:
        result: "right", "wrong" where numbers differ, "dropped" where a weight stays the base's, or "refused".
    """

    options: dict[str, Any] = field(default_factory=dict)
    result: str = "right"
    build: Callable[[], nn.Module] = grouped_llama


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
FORMS = {
    "plain LoRA": Form(),
    "rsLoRA": Form({"use_rslora": True}, "wrong"),
    "lora_alpha by layer": Form({"alpha_pattern": {"q_proj": 3}}, "wrong"),
    "PiSSA": Form({"init_lora_weights": "pissa"}),
    "DoRA": Form({"use_dora": True}, "refused"),
    "LoHa": Form({"variant": "loha"}, "refused"),
    "biases": Form({"target_modules": ["dense"], "bias": "lora_only"}, "refused", neox),
    "embedding": Form(EMBEDDING),
    "tied embedding": Form(EMBEDDING, "refused", tied_llama),
    "saved norms": Form({"modules_to_save": ["input_layernorm"]}, "dropped"),
    "rows of a table": Form({"trainable_token_indices": {"embed_tokens": [3, 4]}}, "refused"),
    "experts": Form(EXPERTS, "refused", PEERS["mixtral"].build),
    "fused query, key and value": Form({"target_modules": ["query_key_value", "dense"]}, build=neox),
    "GPT-2": Form({"target_modules": ["c_attn"]}, "refused", gpt2),
    "GPT-2's square layers": Form({"target_modules": ["attn.c_proj"]}, "wrong", gpt2),
}
PLAIN = {
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "rsLoRA, patterns and PiSSA": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 3},
        "use_rslora": True,
        "init_lora_weights": "pissa",
    },
    "LoHa": {"variant": "loha"},
    "embedding": {**EMBEDDING, "use_rslora": True},
}


@pytest.fixture(autouse=True)
def _path_to_the_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLACE)
    monkeypatch.syspath_prepend(f"{PLACE}/gguf-py")


def read(path: Path) -> tuple[float, Tensors]:
    """Return an adapter's lora_alpha, 0 of a model, and the tensors."""
    from gguf import GGUFReader

    file = GGUFReader(path)
    alpha = file.fields.get("adapter.lora.alpha")
    values = {each.name: torch.tensor(each.data.copy()).double() for each in file.tensors}
    return float(alpha.contents()) if alpha is not None else 0.0, values


def convert_adapter(folder: Path, base: Path) -> tuple[float, Tensors]:
    """Run convert_lora_to_gguf.py as its command does. It raises, or exits, where it refuses."""
    out = folder.with_suffix(".gguf")
    argv = ["convert_lora_to_gguf.py", "--base", str(base), "--outfile", str(out), str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(f"{PLACE}/convert_lora_to_gguf.py", run_name="__main__")
    return read(out)


def convert_weights(folder: Path) -> Tensors:
    """Run what convert_hf_to_gguf.py runs, but for the vocabulary and settings, which are not looked at here."""
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import LlamaFileType

    parameters = ModelBase.load_hparams(folder, False)
    kind = get_model_class(get_model_architecture(parameters, ModelType.TEXT))
    nothing = dict.fromkeys(("set_vocab", "set_gguf_parameters"), lambda self: None)
    out = folder.with_suffix(".gguf")
    weights_alone = type("Weights", (kind,), {"model_arch": kind.model_arch, **nothing})
    weights_alone(folder, LlamaFileType.ALL_F32, out, hparams=parameters).write()
    return read(out)[1]


class NotServedError(Exception):
    """What llama_adapter_lora_init_impl throws, or the end of the process in build_lora_mm."""


def served(base: Tensors, alpha: float, adapter: Tensors) -> Tensors:
    """Return the weights that llama-adapter.cpp and llama-graph.cpp compute with, the adapter's scale being 1."""
    result = dict(base)
    for name, a in adapter.items():
        if name.endswith((".lora_b", "_norm.weight")):
            continue
        weight = name.removesuffix(".lora_a")
        if weight == name:
            raise NotServedError(f"{name} has unexpected suffix")
        if weight not in base:
            raise NotServedError(f"{name} does not exist in base model")
        if weight == "token_embd.weight" and "output.weight" not in base:
            raise NotServedError("the head has this name too, and the factors are the wrong way round for it")
        b = adapter[f"{weight}.lora_b"]
        change = (b @ a.T).T if weight == "token_embd.weight" else b @ a
        if change.shape != base[weight].shape:
            raise NotServedError(f"{name} has incorrect shape")
        result[weight] = base[weight] + alpha / b.shape[1] * change
    return result


def result_of(served_: Tensors, base: Tensors, merged: Tensors) -> str:
    """Compare what is served with the merged model, converted by the same program."""
    assert served_.keys() == base.keys() == merged.keys()
    differing = [name for name in merged if not torch.allclose(served_[name], merged[name], rtol=0, atol=1e-6)]
    if not differing:
        return "right"
    return "dropped" if all(torch.equal(served_[name], base[name]) for name in differing) else "wrong"


def save_base(net: Any, path: Path) -> Path:
    net.save_pretrained(path)
    return path


def adapted(build: Callable[[], nn.Module], options: dict[str, Any]) -> nn.Module:
    """Build an adapted model. What is trained in it has values that bfloat16 holds too."""
    net = seeded(build)
    targets = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    inject(net, LoRAConfig(**{**targets, **options}))
    spread_(net)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    return net


def outcome(folder: Path, net: nn.Module, build: Callable[[], nn.Module]) -> str:
    base = save_base(seeded(build), folder.with_name("base"))
    try:
        alpha, adapter = convert_adapter(folder, base)
        weights = convert_weights(base)
        computed = served(weights, alpha, adapter)
    except (
        AssertionError,
        KeyError,
        ValueError,
        SystemExit,
        NotServedError,
    ):  # of no class of its own
        return "refused"
    factors = [name for name in load_file(folder / TENSORS) if name.endswith((".lora_A.weight", ".lora_embedding_A"))]
    if len(factors) > sum(name.endswith(".lora_a") for name in adapter):
        return "dropped"
    merged = seeded(build)
    merged.load_state_dict(merged_state_dict(net))
    return result_of(computed, weights, convert_weights(save_base(merged, folder.with_name("merged"))))


@pytest.mark.parametrize("name", FORMS)
def test_converter_makes_of_an_adapter_what_the_page_says(tmp_path, name: str):
    form, folder = FORMS[name], tmp_path / "own"
    net = adapted(form.build, form.options)
    save_adapter(net, folder)
    edit(folder, base_model_name_or_path="base")
    assert outcome(folder, net, form.build) == form.result


@pytest.mark.parametrize("name", PLAIN)
def test_converter_makes_the_merged_model_of_every_plain_form(tmp_path, name: str):
    folder, net = tmp_path / "plain", adapted(grouped_llama, PLAIN[name])
    export_adapter(take_adapter(net), folder, plain=True)
    edit(folder, base_model_name_or_path="base")
    assert outcome(folder, net, grouped_llama) == "right"


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)], ids=str)
def test_convolutions_are_refused(tmp_path, layer: nn.Module):
    net = nn.Sequential(layer)
    inject(net, LoRAConfig(r=2, target_modules=["0"]))
    save_adapter(net, tmp_path / "own")
    edit(tmp_path / "own", base_model_name_or_path="base")
    with pytest.raises((AssertionError, ValueError)):
        convert_adapter(tmp_path / "own", save_base(seeded(grouped_llama), tmp_path / "base"))
