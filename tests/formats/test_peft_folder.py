"""Adapter folders both ways between this package, peft and transformers."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import lightning as L
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    combine,
    export_adapter,
    inject,
    load_adapter,
    merge_and_unload,
    read_adapter,
    save_adapter,
)
from lightning_lora.formats.peft_folder import read_folder, write_folder
from lightning_lora.model.adapted_model import open_model
from support.models import checkpoint
from support.notices import quiet_peers
from support.peers import (
    TENSORS,
    close,
    config_of,
    edit,
    every_peer,
    fill_,
    logits,
    model,
    our_config,
    ours,
    read_by_peft,
    refused,
    seeded,
    theirs,
)
from support.tables import Net

pytestmark = quiet_peers


@every_peer
def test_peft_reads_our_folder_with_the_same_outputs(tmp_path, name: str):
    net = ours(name, tmp_path / "a")
    assert (logits(net) - logits(model(name))).abs().max() > 1e-3
    close(logits(read_by_peft(name, tmp_path / "a")), logits(net))


@every_peer
def test_load_adapter_reads_a_peft_folder_with_the_same_outputs(tmp_path, name: str):
    other = theirs(name, tmp_path / "a")
    net = model(name)
    load_adapter(net, tmp_path / "a")
    assert (logits(net) - logits(model(name))).abs().max() > 1e-3
    close(logits(net), logits(other))


@every_peer
def test_load_adapter_reads_our_folder_bit_for_bit(tmp_path, name: str):
    net = ours(name, tmp_path / "a")
    fresh = model(name)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), logits(net))
    assert open_model(fresh, "test").record.config == our_config(name)
    for key, tensor in adapter_state_dict(net).items():
        assert torch.equal(adapter_state_dict(fresh)[key], tensor), key


@every_peer
def test_merged_weights_of_a_peft_folder_equal_those_of_peft(tmp_path, name: str):
    other = theirs(name, tmp_path / "a")
    net = model(name)
    load_adapter(net, tmp_path / "a")
    expected = other.merge_and_unload().state_dict()
    found = merge_and_unload(net).state_dict()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-7, msg=key)


@every_peer
def test_options_survive_the_way_to_peft_and_back(tmp_path, name: str):
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
    for option in ("lora_dropout", "bias", "use_rslora"):
        assert written[option] == original[option] == again[option], option
        assert plain[option] == (original[option] or plain[option]), option
    options = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    described = [LoRAConfig(**{n: x[n] for n in options if x[n] is not None}) for x in (written, original, again)]
    for layer in read_folder(tmp_path / "b").layers:
        assert len({(config.rank(layer), config.scaling(layer)) for config in described}) == 1, layer
    for option in ("fan_in_fan_out", "init_lora_weights"):
        assert written[option] == original[option] == again[option], option
    added_by_peft = {"score"} & set(original["modules_to_save"] or ())
    saved = [set(config["modules_to_save"] or ()) for config in (written, original, again)]
    assert saved[0] == saved[1] - added_by_peft
    assert saved[2] == saved[1]
    assert again["task_type"] == original["task_type"]


def test_transformers_loads_our_folder_with_the_same_outputs(tmp_path):
    for name in ("llama", "gpt2", "mixtral"):
        net = ours(name, tmp_path / name)
        fresh = model(name)
        fresh.load_adapter(tmp_path / name)  # type: ignore[operator]
        close(logits(fresh), logits(net))


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
    assert open_model(fresh, "test").record.config.modules_to_save == ("classifier",)
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


def test_a_dumped_bias_is_the_bases_too(tmp_path):
    """PEFT saves all of a resized head, and with it its bias."""
    net = seeded(lambda: Net(bias=True))
    other = peft.get_peft_model(net, peft.LoraConfig(target_modules=["body"]))
    fill_(other)
    other.save_pretrained(tmp_path)
    head = {f"base_model.model.head.{leaf}": net.head.get_parameter(leaf).detach() for leaf in ("weight", "bias")}
    save_file(load_file(tmp_path / TENSORS) | head, tmp_path / TENSORS)
    load_adapter(fresh := seeded(lambda: Net(bias=True)), tmp_path)
    assert [name for name, parameter in fresh.named_parameters() if parameter.requires_grad] == [
        "body.lora_A",
        "body.lora_B",
    ]
    moved = seeded(lambda: Net(bias=True))
    with torch.no_grad():
        moved.head.bias.add_(1)
    with pytest.raises(LoRAError, match=r"another base: values of 'head\.bias'"):
        load_adapter(moved, tmp_path)


def test_the_old_file_format_of_peft_is_read(tmp_path):
    other = theirs("llama", tmp_path)
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    fresh = model("llama")
    load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(other))


def test_the_folder_around_adapters_that_peft_saved_by_name_is_refused_with_those_in_it(tmp_path, capsys):
    plain, run = nn.Sequential(nn.Linear(4, 4)), tmp_path / "run"
    options = peft.LoraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(copy.deepcopy(plain), options, adapter_name="style").save_pretrained(run)
    expected = f"Give one of these: {run / 'style'}."
    for read in (read_adapter, lambda path: load_adapter(plain, path)):
        with pytest.raises(LoRAError, match=re.escape(expected)):
            read(run)
    for command in (("info",), ("export", tmp_path / "exported")):
        verb, *rest = command
        assert expected in refused(capsys, verb, run, *rest)
    assert load_adapter(plain, run / "style") == ["0"]
    (run / "model.safetensors").write_bytes(b"")  # a model's folder, with checkpoints of a run in it
    with pytest.raises(LoRAError, match="no such file"):
        read_adapter(run)


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


BY_NUMBER: list[dict[str, Any]] = [
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
]


def adapted_by_peft(net: peft.PeftModel) -> list[str]:
    return sorted(net.base_model.targeted_module_names)


@pytest.mark.parametrize("options", BY_NUMBER)
def test_layers_by_number_are_spelled_out_for_peft_and_read_back(tmp_path, options):
    net = ours("llama", tmp_path, **options)
    layers = inject(net, our_config("llama", **options))
    assert {name.split(".")[2] for name in layers} == set(map(str, [1] if len(layers) < 6 else [0, 1]))
    assert not {"layers_to_transform", "layers_pattern"} & config_of(tmp_path).keys()
    read = read_by_peft("llama", tmp_path)
    assert adapted_by_peft(read) == sorted(layers)
    close(logits(read), logits(net))
    fresh = model("llama")
    assert load_adapter(fresh, tmp_path) == layers
    assert open_model(fresh, "test").record.config == our_config("llama", **options)
    assert torch.equal(logits(fresh), logits(net))


@pytest.mark.parametrize("options", BY_NUMBER)
def test_layers_by_number_in_a_peft_folder_are_options_here_too(tmp_path, options):
    other = theirs("llama", tmp_path, **options)
    for fresh in (model("llama"), Lit()):
        layers = load_adapter(fresh, tmp_path)
        assert sorted(name.removeprefix("model." * isinstance(fresh, Lit)) for name in layers) == adapted_by_peft(other)
        config = open_model(fresh, "test").record.config
        assert (config.layers_to_transform, config.layers_pattern) == (
            our_config("llama", **options).layers_to_transform,
            our_config("llama", **options).layers_pattern,
        )
        close(logits(getattr(fresh, "model", fresh) if isinstance(fresh, Lit) else fresh), logits(other))


@pytest.mark.parametrize(
    "edited",
    [
        {"layers_to_transform": [1, 5]},  # of a longer model
        {"layers_to_transform": None, "layers_pattern": ["layers"]},  # as earlier versions of peft allowed
        {"target_modules": r".*layers\.1\..*(q_proj|v_proj|down_proj)"},
    ],
)
def test_layers_by_number_that_say_something_else_than_the_tensors_are_passed_over(tmp_path, edited):
    other = theirs("llama", tmp_path, layers_to_transform=[1])
    edit(tmp_path, **edited)
    fresh = model("llama")
    assert sorted(load_adapter(fresh, tmp_path)) == adapted_by_peft(other)
    close(logits(fresh), logits(other))


@pytest.mark.parametrize("options", [*BY_NUMBER, {"exclude_modules": r".*layers\.0\..*"}])
def test_what_options_take_out_of_the_targets_stays_out_where_a_folder_goes_through_a_checkpoint(tmp_path, options):
    other = theirs("llama", tmp_path / "theirs", **options)
    load_adapter(net := model("llama"), tmp_path / "theirs")
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    export_adapter(tmp_path / "a.ckpt", tmp_path / "again")
    read = read_by_peft("llama", tmp_path / "again")
    assert adapted_by_peft(read) == adapted_by_peft(other)
    close(logits(read), logits(other))


class Stack(nn.Module):
    """A network that is a list of layers by itself: the names of its modules begin with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["k"](layer["q"](x).tanh())
        return x


def test_numbers_that_count_in_a_lightning_module_mean_the_same_layers_in_the_network_alone(tmp_path):
    lit = L.LightningModule()
    lit.net = seeded(Stack)
    inject(lit, LoRAConfig(r=2, target_modules=["q"], layers_to_transform=[1]))
    fill_(lit)
    save_adapter(lit, tmp_path)
    x = torch.randn(2, 4)
    read = peft.PeftModel.from_pretrained(seeded(Stack), tmp_path)
    assert adapted_by_peft(read) == ["layers.1.q"]
    close(read(x), lit.net(x))
    alone = seeded(Stack)
    assert load_adapter(alone, tmp_path) == ["layers.1.q"]
    close(alone(x), lit.net(x))


KINDS: dict[str, Any] = {
    "linear": nn.Linear,
    "conv1d": lambda i, o: Conv1D(o, i),
    "embedding": nn.Embedding,
    "convolution": lambda i, o: nn.Conv1d(i, o, 3),
    "convolution2": lambda i, o: nn.Conv2d(i, o, 3),
    "convolution3": lambda i, o: nn.Conv3d(i, o, 3),
    "attention": lambda i, o: nn.MultiheadAttention(i, 2),
    "parameter": nn.LSTM,
}
INITS = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "eva", "lora_ga"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", INITS)
def test_peft_loads_adapters_of_every_start_on_every_layer(tmp_path, kind: str, init: Any, options: dict[str, Any]):
    starts = init in ("pissa", "pissa_niter_2", "olora", "lora_ga")
    if options and (kind in ("attention", "parameter") or starts):
        pytest.skip("DoRA is not for these")

    def build() -> Any:
        return seeded(lambda: nn.Sequential(KINDS[kind](6, 4)))

    net = build()
    targets = {"target_modules": [], "target_parameters": ["weight_hh_l0"]} if kind == "parameter" else {}
    inject(net, LoRAConfig(r=2, init_lora_weights=init, **{"target_modules": ["0"], **targets, **options}))
    fill_(net)
    save_adapter(net, tmp_path)
    read = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    x = torch.randn(2, 6, 5, 5, 5)
    inputs = {"convolution": x[..., 0, 0], "convolution2": x[..., 0], "convolution3": x, "embedding": torch.arange(4)}
    given = inputs.get(kind, x[..., 0, 0, 0])
    layers = [each[0] if kind == "attention" else each for each in (net, read.base_model.model, build())]
    by_us, by_peft, plain = (each(given, given, given)[0] if kind == "attention" else each(given) for each in layers)
    by_us, by_peft, plain = (out[0] if isinstance(out, tuple) else out for out in (by_us, by_peft, plain))
    torch.testing.assert_close(by_peft, by_us, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_us, plain, atol=1e-4)
    again = build()
    load_adapter(again, tmp_path)
    assert open_model(again, "test").record.config.init_lora_weights == init


@pytest.mark.parametrize("door", ["export", "combine", "extract"])
def test_an_adapter_without_buffers_loads_after_every_door(tmp_path, door: str):
    other = theirs("convolutions", tmp_path / "a")  # PEFT saves no statistics of BatchNorm
    target: Any = tmp_path / "b"
    if door == "export":
        export_adapter(tmp_path / "a", target)
    elif door == "combine":
        combine([tmp_path / "a"], [1], output=target)
    else:
        write_folder(replace(read_folder(tmp_path / "a"), fingerprint={}, complete=False), target)
    net = model("convolutions")
    load_adapter(net, target)
    close(logits(net), logits(other))
    close(logits(swapped := ours("convolutions")), logits(ours("convolutions")))
    load_adapter(swapped, target)
    close(logits(swapped), logits(other))


def test_a_folder_that_says_that_it_is_complete_needs_its_buffers(tmp_path):
    ours("convolutions", tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    del tensors["base_model.model.bn.running_mean"]
    save_file(tensors, tmp_path / TENSORS, metadata)
    with pytest.raises(LoRAError, match=r"'bn\.running_mean' is missing"):
        load_adapter(model("convolutions"), tmp_path)


def test_a_folder_of_another_method_is_refused_by_name(tmp_path):
    config = peft.VeraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(str(tmp_path))
    with pytest.raises(LoRAError, match=r"peft_type is 'VERA', only 'LOHA', 'LORA' is read"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    with pytest.raises(LoRAError, match=r"expected a peft\.LoraConfig, found a VeraConfig"):
        LoRAConfig.from_peft(config)
