"""Adapter folders both ways between this package, peft and transformers."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from interchange import (
    every_peer,
    logits,
    model,
    our_config,
    ours,
    quiet_peers,
    read_by_peft,
    theirs,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    inject,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from lightning_lora.injection import require_injection
from lightning_lora.merge import adapted_layers
from lightning_lora.peft_format import read_folder

pytestmark = quiet_peers
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def config_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / CONFIG).read_text())
    return result


def edit(path: Path, **options: Any) -> None:
    (path / CONFIG).write_text(json.dumps(config_of(path) | options))


@every_peer
def test_peft_reads_ours(tmp_path, name: str):
    net = ours(name, tmp_path / "a")
    assert (logits(net) - logits(model(name))).abs().max() > 1e-3
    close(logits(read_by_peft(name, tmp_path / "a")), logits(net))


@every_peer
def test_we_read_pefts(tmp_path, name: str):
    other = theirs(name, tmp_path / "a")
    net = model(name)
    load_adapter(net, tmp_path / "a")
    assert (logits(net) - logits(model(name))).abs().max() > 1e-3
    close(logits(net), logits(other))


@every_peer
def test_we_read_ours(tmp_path, name: str):
    net = ours(name, tmp_path / "a")
    fresh = model(name)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), logits(net))
    assert require_injection(fresh, "test")[2].config == our_config(name)
    for key, tensor in adapter_state_dict(net).items():
        assert torch.equal(adapter_state_dict(fresh)[key], tensor), key


@every_peer
def test_merged_weights_are_pefts(tmp_path, name: str):
    other = theirs(name, tmp_path / "a")
    net = model(name)
    load_adapter(net, tmp_path / "a")
    expected = other.merge_and_unload().state_dict()
    found = merge_and_unload(net).state_dict()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-7, msg=key)


@every_peer
def test_options_survive(tmp_path, name: str):
    """From us to peft's file, from peft's file to us, and from there to peft's file again."""
    ours(name, tmp_path / "a")
    theirs(name, tmp_path / "b")
    net = model(name)
    load_adapter(net, tmp_path / "b")
    save_adapter(net, tmp_path / "c")
    written, original, again = (config_of(tmp_path / x) for x in "abc")
    read = read_folder(tmp_path / "b").config
    assert read is not None
    plain = read.to_dict()
    for option in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert written[option] == original[option] == again[option], option
        assert plain[option] == (original[option] or plain[option]), option
    for option in ("fan_in_fan_out", "init_lora_weights"):
        assert written[option] == original[option] == again[option], option
    added_by_peft = {"score"} & set(original["modules_to_save"] or ())
    saved = [set(config["modules_to_save"] or ()) for config in (written, original, again)]
    assert saved[0] == saved[1] - added_by_peft == saved[2]


def test_transformers_loads_ours(tmp_path):
    for name in ("llama", "gpt2", "mixtral"):
        net = ours(name, tmp_path / name)
        fresh = model(name)
        fresh.load_adapter(tmp_path / name)  # type: ignore[operator]
        close(logits(fresh), logits(net))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.other = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.other(self.qkv(x).relu())
        return result


def seeded(build: Any, seed: int = 5) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def fill_(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("parts", [[True, False, True], [False, True, False], [True, True, True]])
def test_adapted_parts_of_a_fused_projection_are_plain_lora_for_peft(tmp_path, parts: list[bool], use_rslora: bool):
    net = seeded(Fused)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["qkv", "other"], "use_rslora": use_rslora}
    inject(net, LoRAConfig(enable_lora={"qkv": parts}, **options))
    fill_(net)
    save_adapter(net, tmp_path)
    x = torch.randn(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = peft.PeftModel.from_pretrained(seeded(Fused), tmp_path).eval()
    close(read(x), net(x))
    assert read.base_model.model.qkv.r["default"] == 2 * sum(parts)
    fresh = seeded(Fused)
    load_adapter(fresh, tmp_path)
    assert all(torch.equal(tensor, adapter_state_dict(net)[key]) for key, tensor in adapter_state_dict(fresh).items())
    again = seeded(Fused)
    inject(again, LoRAConfig(enable_lora={"qkv": parts}, **options))
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))


def test_a_changed_fused_adapter_is_not_squeezed_into_parts(tmp_path):
    net = seeded(Fused)
    inject(net, LoRAConfig(r=2, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))
    save_adapter(fill_(net), tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.qkv.lora_B.weight"][5, 0] = 1
    save_file(tensors, tmp_path / TENSORS, metadata)
    with pytest.raises(LoRAError, match="'qkv': its B is not zero outside the blocks"):
        load_adapter(seeded(Fused), tmp_path)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(x)
        return result


def test_grouped_convolutions_are_refused_both_ways_with_the_reason(tmp_path):
    net = Grouped()
    inject(net, LoRAConfig(r=2, target_modules=["conv"]))
    with pytest.raises(LoRAError, match="'conv' is a convolution with groups; PEFT's adapter for those mixes"):
        save_adapter(net, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.warns(UserWarning, match="groups > 1"):
        other = peft.get_peft_model(Grouped(), peft.LoraConfig(r=2, target_modules=["conv"]))
    other.save_pretrained(tmp_path / "b")
    fresh = Grouped()
    with pytest.raises(LoRAError, match=r"'conv' is a convolution with 2 groups.*crosses the groups"):
        load_adapter(fresh, tmp_path / "b")
    assert type(fresh.conv) is nn.Conv2d


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, **options)


@pytest.mark.parametrize(
    ("message", "options", "config"),
    [
        ("out_proj of 'mha'; PEFT adapts attention whole and passes over", {}, {"target_modules": ["out_proj"]}),
        ("adapted without its out_proj", {}, {"target_modules": ["mha"], "exclude_modules": ["out_proj"]}),
        ("another rank or lora_alpha", {}, {"target_modules": ["mha"], "rank_pattern": {"out_proj": 1}}),
        ("another rank or lora_alpha", {}, {"target_modules": ["mha"], "alpha_pattern": {"out_proj": 1}}),
        ("separate or partly adapted", {}, {"target_modules": ["mha"], "enable_lora": {"mha": [True, False, True]}}),
        ("separate or partly adapted", {"kdim": 3, "vdim": 5}, {"target_modules": ["mha"]}),
    ],
)
def test_attention_that_peft_has_not_is_refused(tmp_path, message: str, options: Any, config: Any):
    net = Attention(**options)
    inject(net, LoRAConfig(r=2, **config))
    with pytest.raises(LoRAError, match=message):
        save_adapter(net, tmp_path)
    assert not any(tmp_path.iterdir())


def test_attention_of_a_later_peft_is_refused(tmp_path):
    theirs("convolutions", tmp_path)
    edit(tmp_path, peft_version="0.22.0")
    with pytest.raises(LoRAError, match=r"written by peft 0\.22\.0\. peft up to 0\.21 adds the change of out_proj"):
        load_adapter(model("convolutions"), tmp_path)


def test_peft_still_counts_out_proj_twice():
    """What equivalents.OUT_PROJ_COUNTS stands for; when this fails, peft was mended and its version must decide."""
    net = theirs("convolutions")
    out_proj = net.base_model.model.mha.base_layer.out_proj
    delta = out_proj.get_delta_weight("default")
    before = model("convolutions").mha.out_proj.weight
    close(net.merge_and_unload().mha.out_proj.weight, before + 2 * delta)


class Lit(L.LightningModule):
    """A network behind an attribute, as most programs have it."""

    def __init__(self, name: str = "llama") -> None:
        super().__init__()
        self.model = model(name)


def test_the_attribute_of_the_lightning_module_is_taken_off_and_found_again(tmp_path):
    lit = Lit()
    names = ["model.model.layers.0.self_attn.q_proj", "model.model.layers.1.mlp.down_proj"]
    patterns = {"rank_pattern": {r"model\.model\.layers\.1\.mlp\.down_proj": 2}}
    inject(lit, LoRAConfig(r=4, target_modules=names, modules_to_save=["model.model.norm"], **patterns))
    fill_(lit)
    save_adapter(lit, tmp_path)
    keys = load_file(tmp_path / TENSORS).keys()
    assert {key.split(".lora_")[0] for key in keys} == {
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.1.mlp.down_proj",
        "base_model.model.model.norm.weight",
    }
    expected = logits(lit.model)
    close(logits(read_by_peft("llama", tmp_path)), expected)
    for fresh in (Lit(), Lit().model):
        load_adapter(fresh, tmp_path)
        assert torch.equal(logits(fresh.model if isinstance(fresh, Lit) else fresh), expected)


def test_a_module_that_is_no_lightning_module_keeps_its_names(tmp_path):
    ours("llama", tmp_path)
    assert all(key.startswith("base_model.model.model.layers.") for key in load_file(tmp_path / TENSORS))


def test_targets_match_no_other_module_by_suffix(tmp_path):
    """peft takes list entries as suffixes: a list that would also name other layers becomes an expression."""
    net = nn.ModuleDict({"q": nn.Linear(4, 4), "block": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    inject(net, LoRAConfig(r=2, target_modules=r"q"))
    save_adapter(net, tmp_path)
    assert config_of(tmp_path)["target_modules"] == "q"
    fresh = nn.ModuleDict({"q": nn.Linear(4, 4), "block": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    read = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert isinstance(read.base_model.model.block.q, nn.Linear)
    assert not hasattr(read.base_model.model.block.q, "lora_A")


def test_buffers_travel_to_peft_too(tmp_path):
    net = ours("convolutions")
    net.bn.running_mean.add_(3)
    save_adapter(net, tmp_path)
    assert torch.equal(read_by_peft("convolutions", tmp_path).base_model.model.bn.running_mean, net.bn.running_mean)
    fresh = model("convolutions")
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.bn.running_mean, net.bn.running_mean)


def test_modules_to_save_that_name_nothing_are_no_typo_in_a_peft_folder(tmp_path):
    other = theirs("bert", tmp_path)
    assert set(config_of(tmp_path)["modules_to_save"]) == {"classifier", "score"}
    fresh = model("bert")
    load_adapter(fresh, tmp_path)
    assert require_injection(fresh, "test")[2].config.modules_to_save == ("classifier",)
    close(logits(fresh), logits(other))


def test_a_dumped_embedding_is_compared_with_the_base(tmp_path):
    theirs("llama-embedding", tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / TENSORS)
    load_adapter(model("llama-embedding"), tmp_path)
    other = model("llama-embedding")
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.05)
    before = logits(other)
    with pytest.raises(LoRAError, match=r"another base: values of 'model\.embed_tokens\.weight'"):
        load_adapter(other, tmp_path)
    assert torch.equal(logits(other), before)
    with pytest.warns(UserWarning, match="another base"):
        load_adapter(other, tmp_path, strict_base=False)


def test_the_old_file_format_of_peft_is_read(tmp_path):
    other = theirs("llama", tmp_path)
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    fresh = model("llama")
    load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(other))


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "README.md").write_text("mine")
    (tmp_path / "a" / "sub" / "x").write_text("mine too")
    (tmp_path / "a" / "link").symlink_to("README.md")
    for alpha in (8, 4):
        ours("llama", tmp_path / "a", lora_alpha=alpha)
        assert config_of(tmp_path / "a")["lora_alpha"] == alpha
        assert (tmp_path / "a" / "README.md").read_text() == "mine"
        assert (tmp_path / "a" / "sub" / "x").read_text() == "mine too"
        assert (tmp_path / "a" / "link").is_symlink()
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "use_dora": ("mixtral", {"use_dora": True}),
    "lora_bias": ("gpt2", {"lora_bias": True}),
    "trainable_token_indices": ("mixtral", {"trainable_token_indices": [1, 2]}),
    "target_parameters": ("mixtral", {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}),
    "init_lora_weights='pissa'": ("mixtral", {"init_lora_weights": "pissa"}),
    "init_lora_weights='olora'": ("mixtral", {"init_lora_weights": "olora"}),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")  # peft of its own lora_bias
@pytest.mark.parametrize("feature", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(tmp_path, feature: str):
    name, options = REFUSED[feature]
    theirs(name, tmp_path, **options)
    fresh = model(name)
    types = [type(module) for module in fresh.modules()]
    before = logits(fresh)
    with pytest.raises(LoRAError, match=f"{CONFIG}: {feature}"):
        load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), before)
    assert [type(module) for module in fresh.modules()] == types
    if not feature.startswith("init"):  # the tensors say it too
        edit(tmp_path, **dict.fromkeys(options) | {"target_modules": ["experts", "q_proj"]})
        with pytest.raises(LoRAError, match=r"belongs to (DoRA|lora_bias|trainable)|its factors have rank 16"):
            load_adapter(fresh, tmp_path)


def test_an_unknown_option_is_refused_where_it_is_in_use(tmp_path):
    other = theirs("llama", tmp_path)
    edit(tmp_path, use_something_new=False)
    fresh = model("llama")
    load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(other))
    edit(tmp_path, use_something_new={"a": 1})
    with pytest.raises(LoRAError, match=r"use_something_new=\{'a': 1\} cannot be applied"):
        load_adapter(model("llama"), tmp_path)


def test_a_transposed_layer_of_the_same_shape_is_another_layer(tmp_path):
    net = nn.ModuleDict({"square": nn.Linear(4, 4)})
    inject(net, LoRAConfig(r=2, target_modules=["square"]))
    save_adapter(net, tmp_path)
    with pytest.raises(LoRAError, match="'square' was a Linear layer where the adapter was trained, here it is Conv1D"):
        load_adapter(nn.ModuleDict({"square": Conv1D(4, 4)}), tmp_path)


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
def test_vllms_rules_hold(tmp_path, name: str, options: dict[str, Any]):
    net = ours(name, tmp_path, **options)
    linear = {key.rpartition(".")[2] for key, module in net.named_modules() if isinstance(module, nn.Linear)}
    modules = vllm_scaling(tmp_path, linear | {"embed_tokens"})
    for key, layer in adapted_layers(net).items():
        a, b, scaling = modules.pop(key)
        torch.testing.assert_close(b @ a * scaling, layer.lora_B @ layer.lora_A * layer.lora_scaling)
    assert not modules


def test_vllm_reads_a_fused_adapter_with_one_rank_and_alpha(tmp_path):
    net = seeded(Fused)
    inject(net, LoRAConfig(r=2, lora_alpha=3, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))
    save_adapter(fill_(net), tmp_path)
    (a, b, scaling) = vllm_scaling(tmp_path, {"qkv"})["qkv"]
    x = torch.randn(3, 6)
    close(seeded(Fused).qkv(x) + x @ a.T @ b.T * scaling, net.qkv(x))
