"""Adapter folders both ways between this package, peft and transformers."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path
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
    take_adapter,
)
from lightning_lora.formats.peft_reading import read_folder
from lightning_lora.model.adapted_model import open_model
from support.covering import covering
from support.models.networks import checkpoint
from support.models.peers import (
    PEERS,
    TENSORS,
    close,
    config_of,
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
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
OF_THE_CORE = ("llama", "llama-embedding")
every_peer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.core if name in OF_THE_CORE else ()) for name in PEERS]
)


@every_peer
def test_our_folder_gives_the_same_outputs_in_peft_and_the_same_bits_here(tmp_path, name: str):
    net = ours(name, tmp_path)
    expected = logits(net)
    assert (expected - logits(model(name))).abs().max() > 1e-3
    close(logits(read_by_peft(name, tmp_path)), expected)
    load_adapter(fresh := model(name), tmp_path)
    assert torch.equal(logits(fresh), expected)
    assert open_model(fresh, "test").injection.config == our_config(name)
    state = adapter_state_dict(net)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state_dict(fresh).items())
    if name in ("llama", "gpt2"):
        (plain := model(name)).load_adapter(tmp_path)  # type: ignore[operator]  # transformers' own
        close(logits(plain), expected)


@every_peer
def test_a_folder_of_peft_gives_the_same_outputs_and_merged_weights_here_and_its_options_come_back(tmp_path, name: str):
    other, net = theirs(name, tmp_path / "theirs"), model(name)
    load_adapter(net, tmp_path / "theirs")
    assert (logits(net) - logits(model(name))).abs().max() > 1e-3
    close(logits(net), logits(other))
    save_adapter(net, tmp_path / "ours")
    # in float64, in which each order of sums gives the same digits; and of a model whose attention did not run in peft
    expected = read_by_peft(name, tmp_path / "theirs").double().merge_and_unload().state_dict()
    found = merge_and_unload(net.double()).state_dict()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-13, msg=key)

    original, again = config_of(tmp_path / "theirs"), config_of(tmp_path / "ours")
    read = read_folder(tmp_path / "theirs")
    assert read.config is not None
    for option in ("lora_dropout", "bias", "use_rslora", "fan_in_fan_out", "init_lora_weights", "task_type"):
        assert again[option] == original[option], option
    options = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    described = [LoRAConfig(**{n: x[n] for n in options if x[n] is not None}) for x in (original, again)]
    for layer in read.layers:
        assert len({(config.rank(layer), config.scaling(layer)) for config in described}) == 1, layer
    assert set(again["modules_to_save"] or ()) == set(original["modules_to_save"] or ())


class Lit(L.LightningModule):
    """A network behind an attribute, as most programs have it."""

    def __init__(self, name: str = "llama") -> None:
        super().__init__()
        self.model = model(name)


@pytest.mark.core
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


def test_buffers_travel_to_peft_too_and_a_folder_that_says_that_it_is_complete_needs_them(tmp_path):
    net = ours("convolutions")
    net.bn.running_mean.add_(3)
    save_adapter(net, tmp_path)
    load_adapter(fresh := model("convolutions"), tmp_path)
    for bn in (read_by_peft("convolutions", tmp_path).base_model.model.bn, fresh.bn):
        assert torch.equal(bn.running_mean, net.bn.running_mean)
    tensors = load_file(tmp_path / TENSORS)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    del tensors["base_model.model.bn.running_mean"]
    save_file(tensors, tmp_path / TENSORS, metadata)
    with pytest.raises(LoRAError, match=r"'bn\.running_mean' is missing"):
        load_adapter(model("convolutions"), tmp_path)


class Noting(nn.Module):
    """Its extra state is what it is given, a tensor or not."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        self.layer, self.note = nn.Linear(3, 3), note

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def test_extra_state_that_is_no_tensor_is_left_out_of_a_folder_with_a_warning(tmp_path):
    model = Noting(["seen"])
    inject(model, LoRAConfig(r=1, target_modules=["layer"]))
    with pytest.warns(UserWarning, match=r"extra state \['_extra_state'\] is no tensor"):
        save_adapter(model, tmp_path / "list")
    load_adapter(model, tmp_path / "list")
    assert model.note == ["seen"]
    model.note = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "tensor")
    model.note = None
    load_adapter(model, tmp_path / "tensor")
    assert torch.equal(model.note, torch.ones(2))


def test_attention_whose_out_proj_has_another_scaling_has_no_folder_of_pefts(tmp_path):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    inject(model, LoRAConfig(r=2, target_modules=["attention"]))
    adapter, output = take_adapter(model), "attention.out_proj"
    export_adapter(adapter, tmp_path / "folder")
    adapter = replace(adapter, layers={**adapter.layers, output: replace(adapter.layers[output], scaling=7.0)})
    with pytest.raises(LoRAError, match="'attention' has another rank or lora_alpha"):
        export_adapter(adapter, tmp_path / "other")


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


BY_NUMBER: list[dict[str, Any]] = [
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
    assert open_model(fresh, "test").injection.config == our_config("llama", **options)
    assert torch.equal(logits(fresh), logits(net))


@pytest.mark.parametrize("options", [BY_NUMBER[1], {"exclude_modules": r".*layers\.0\..*"}])
def test_what_options_take_out_of_the_targets_stays_out_where_a_folder_goes_through_a_checkpoint(tmp_path, options):
    other = theirs("llama", tmp_path / "theirs", **options)
    load_adapter(net := model("llama"), tmp_path / "theirs")
    close(logits(net), logits(other))
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    export_adapter(tmp_path / "a.ckpt", tmp_path / "again")
    read = read_by_peft("llama", tmp_path / "again")
    assert adapted_by_peft(read) == adapted_by_peft(other)
    close(logits(read), logits(other))


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


def goes_with_dora(init: Any, kind: str) -> bool:
    return kind not in ("attention", "parameter") and init not in ("pissa", "pissa_niter_2", "olora", "lora_ga")


@pytest.mark.parametrize(
    ("init", "kind", "use_dora"),
    covering(INITS, KINDS, [False, True], meet=1, fits=lambda init, kind, dora: not dora or goes_with_dora(init, kind)),
)
def test_peft_loads_adapters_of_every_start_on_every_layer(tmp_path, init: Any, kind: str, use_dora: bool):
    def build() -> Any:
        return seeded(lambda: nn.Sequential(KINDS[kind](6, 4)))

    net = build()
    targets = {"target_modules": [], "target_parameters": ["weight_hh_l0"]} if kind == "parameter" else {}
    inject(net, LoRAConfig(r=2, init_lora_weights=init, use_dora=use_dora, **{"target_modules": ["0"], **targets}))
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
    assert open_model(again, "test").injection.config.init_lora_weights == init


@pytest.mark.parametrize("door", ["export", "combine"])
def test_an_adapter_without_buffers_loads_after_every_door(tmp_path, door: str):
    other = theirs("convolutions", tmp_path / "a")  # PEFT saves no statistics of BatchNorm
    target: Any = tmp_path / "b"
    if door == "export":
        export_adapter(tmp_path / "a", target)
    else:
        combine([tmp_path / "a"], [1], output=target)
    net = model("convolutions")
    load_adapter(net, target)
    close(logits(net), logits(other))
    close(logits(swapped := ours("convolutions")), logits(ours("convolutions")))
    load_adapter(swapped, target)
    close(logits(swapped), logits(other))


def test_a_folder_of_another_method_is_refused_by_name(tmp_path):
    config = peft.VeraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(str(tmp_path))
    with pytest.raises(LoRAError, match=r"peft_type is 'VERA', only 'LOHA', 'LORA' is read"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    with pytest.raises(LoRAError, match=r"expected a peft\.LoraConfig, found a VeraConfig"):
        LoRAConfig.from_peft(config)


@pytest.mark.parametrize("verb", ["save_adapter", "export_adapter", "combine"])
def test_an_error_begins_with_the_function_that_was_called(verb: str, tmp_path: Path):
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    inject(net, LoRAConfig(r=2, target_modules=["0"]))
    calls = {
        "save_adapter": lambda: save_adapter(net, tmp_path),
        "export_adapter": lambda: export_adapter(take_adapter(net), tmp_path),
        "combine": lambda: combine([take_adapter(net)], output=tmp_path),
    }
    with pytest.raises(LoRAError, match=f"^{verb}: '0' is a convolution with groups"):
        calls[verb]()
