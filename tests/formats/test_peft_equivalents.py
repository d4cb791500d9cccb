"""Layers that PEFT lacks or treats in another way: written as something that PEFT has, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRAError, adapter_state_dict, inject, load_adapter, read_adapter, save_adapter
from support.covering import covering
from support.models.peers import CONFIG, TENSORS, Fused, close, edit, fill_, logits, model, seeded, theirs
from support.runs.notices import quiet_peers

pytestmark = quiet_peers


@pytest.mark.parametrize(("parts", "use_rslora"), [([True, False, True], False), ([False, True, False], True)])
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


def fused() -> nn.Module:
    inject(net := seeded(Fused), LoRAConfig(r=2, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))
    return fill_(net)


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (fused, "qkv", "'qkv': its B is not zero outside the blocks"),
        (lambda: adapted_encoder(), "encoder.layers.0.self_attn", r"'encoder\.layers\.0\.self_attn' must be zero"),
    ],
    ids=["parts", "idle attention"],
)
def test_a_b_that_changed_where_it_has_to_be_zero_is_refused(tmp_path, build: Any, name: str, message: str):
    save_adapter(build(), tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / TENSORS)
    tensors[f"base_model.model.{name}.lora_B.weight"][5, 0] = 1
    save_file(tensors, tmp_path / TENSORS, metadata)
    with pytest.raises(LoRAError, match=message):
        load_adapter(seeded(Fused if name == "qkv" else Encoder), tmp_path)


DAMAGE: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None]]] = {
    "missing": ("is missing; the adapter was cut", lambda tensor: None),
    "without arithmetic": ("must be a floating point tensor", lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "another dimension": ("are no pair|do not fit enable_lora", lambda tensor: tensor[None].clone()),
}


@pytest.mark.parametrize(
    ("damage", "layer", "described"),
    [*covering(DAMAGE, ["mha", "qkv"], [True], meet=1), ("missing", "qkv", False), ("another dimension", "mha", False)],
)
def test_a_damaged_b_that_peft_has_in_another_form_is_refused_by_name(tmp_path, damage: str, layer: str, described):
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "qkv": nn.Linear(4, 4)})
    options = {"mha": {"target_modules": ["mha", "mha.out_proj"]}, "qkv": {"enable_lora": {"qkv": [True, False]}}}
    inject(net, LoRAConfig(r=2, **{"target_modules": ["qkv"], **options[layer]}))
    save_adapter(net, tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        header = file.metadata() if described else {"format": "pt"}
    tensors = load_file(tmp_path / TENSORS)
    name = next(name for name in tensors if name.endswith(("out_proj.lora_B.weight", "qkv.lora_B.weight")))
    message, change = DAMAGE[damage]
    damaged = change(tensors.pop(name))
    save_file(tensors | ({} if damaged is None else {name: damaged}), tmp_path / TENSORS, header)
    with pytest.raises(LoRAError, match=message):
        read_adapter(tmp_path)


def test_grouped_convolutions_are_refused_both_ways_with_the_reason(tmp_path):
    def grouped() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))

    inject(net := grouped(), LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(LoRAError, match="'0' is a convolution with groups; PEFT's adapter for those mixes"):
        save_adapter(net, tmp_path / "a")
    with pytest.warns(UserWarning, match="groups > 1"):
        other = peft.get_peft_model(grouped(), peft.LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(LoRAError, match=r"'0' is a convolution with 2 groups.*crosses the groups"):
        load_adapter(fresh := grouped(), tmp_path / "b")
    assert type(fresh[0]) is nn.Conv2d  # type: ignore[index]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, **options)


@pytest.mark.parametrize(
    ("message", "options", "config"),
    [
        ("'mha', which has q, k and v apart", {"kdim": 3, "vdim": 5}, {"target_modules": ["out_proj"]}),
        ("adapted without its out_proj", {}, {"target_modules": ["mha"], "exclude_modules": ["out_proj"]}),
        ("another rank or lora_alpha", {}, {"target_modules": ["mha", "out_proj"], "rank_pattern": {"out_proj": 1}}),
        ("separate or partly adapted", {}, {"target_modules": ["mha"], "enable_lora": {"mha": [True, False, True]}}),
        ("'mha', which has q, k and v apart", {"kdim": 3, "vdim": 5}, {"target_modules": ["mha"]}),
    ],
)
def test_attention_that_peft_has_not_is_refused(tmp_path, message: str, options: Any, config: Any):
    net = Attention(**options)
    inject(net, LoRAConfig(r=2, **config))
    with pytest.raises(LoRAError, match=message):
        save_adapter(net, tmp_path)
    assert not any(tmp_path.iterdir())
    nameless = Attention().mha
    inject(nameless, LoRAConfig(r=2))
    with pytest.raises(LoRAError, match="'out_proj' belongs to attention without a name"):
        save_adapter(nameless, tmp_path / "a")


class Encoder(nn.Module):
    """The layers of a vision transformer; all-linear adapts out_proj of attention, and not in_proj."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(x))
        return result


ENCODER_OPTIONS: dict[str, dict[str, Any]] = {
    "other ranks": {"rank_pattern": {r"layers\.0\.self_attn\.out_proj": 4}, "alpha_pattern": {"out_proj": 5}},
    "out_proj alone": {"target_modules": ["out_proj"]},
}


def adapted_encoder(**options: Any) -> nn.Module:
    net = seeded(Encoder)
    inject(net, LoRAConfig(**{"r": 2, "lora_alpha": 3, **options}))
    return fill_(net)


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_an_out_proj_adapted_alone_goes_to_peft_and_back(tmp_path, options: dict[str, Any]):
    """As attention adapted whole whose in_proj changes nothing."""
    net, x = adapted_encoder(**options), torch.randn(2, 3, 8)
    save_adapter(net, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = peft.PeftModel.from_pretrained(seeded(Encoder), tmp_path / "ours")
    close(read.train()(x), net.train()(x))  # in evaluation, torch's fast path passes over peft's adapters
    assert (net(x) - seeded(Encoder)(x)).abs().max() > 1e-2

    again = seeded(Encoder)
    assert "encoder.layers.0.self_attn" not in load_adapter(again, tmp_path / "ours")
    wanted = adapter_state_dict(net)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapter_state_dict(again).items())
    assert list(adapter_state_dict(again)) == list(wanted)
    injected = adapted_encoder(**options)
    load_adapter(injected, tmp_path / "ours")
    assert torch.equal(injected(x), net(x))

    read.save_pretrained(tmp_path / "theirs")
    for fresh in (seeded(Encoder), adapted_encoder(**options)):
        assert "encoder.layers.0.self_attn" not in load_adapter(fresh, tmp_path / "theirs")
        close(fresh.train()(x), net(x))


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


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": ("gpt2", {"lora_bias": True}),
    "init_lora_weights='pissa'": ("mixtral", {"init_lora_weights": "pissa"}),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid")  # its own lora_bias
@pytest.mark.parametrize("feature", REFUSED)
def test_peft_feature_that_cannot_be_applied_is_refused_by_name(tmp_path, feature: str):
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
        edit(tmp_path, **dict.fromkeys(options) | {"target_modules": ["q_proj"]})
        with pytest.raises(LoRAError, match=r"belongs to lora_bias|its factors have rank 16"):
            load_adapter(fresh, tmp_path)


def test_a_transposed_layer_of_the_same_shape_is_another_layer(tmp_path):
    net = nn.ModuleDict({"square": nn.Linear(4, 4)})
    inject(net, LoRAConfig(r=2, target_modules=["square"]))
    save_adapter(net, tmp_path)
    with pytest.raises(LoRAError, match="'square' was a Linear layer where the adapter was trained, here it is Conv1D"):
        load_adapter(nn.ModuleDict({"square": Conv1D(4, 4)}), tmp_path)
