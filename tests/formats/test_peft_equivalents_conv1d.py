"""Attention and single parameters beside transformers' Conv1D: PEFT has one flag for all, which the order decides.

So PEFT's files do not hold the two here. Without a Conv1D they do.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    combine,
    export_adapter,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
    take_adapter,
)
from support.covering import covering
from support.models.networks import checkpoint
from support.models.peers import close, fill_, refused, seeded
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(6))
LAYERS: dict[str, Any] = {
    "l": lambda: nn.Linear(8, 8),
    "c": lambda: Conv1D(8, 8),
    "w": lambda: Conv1D(16, 8),
    "m": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "t": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "e": lambda: nn.Embedding(8, 8),
    "r": lambda: nn.LSTM(8, 8, batch_first=True),
}


class Stack(nn.Module):
    """Layers in an order, each named by its letter and its place."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for place, letter in enumerate(order):
            self.add_module(f"{letter}{place}", LAYERS[letter]())
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.named_children():
            if name[0] == "t":
                x = x + layer(x.transpose(1, 2)).transpose(1, 2)
            elif name[0] == "e":
                x = x + layer(x[..., 0].abs().mul(3).long().clamp(0, 7))
            else:
                out = layer(x, x, x) if name[0] == "m" else layer(x)
                x = x + (out[0] if isinstance(out, tuple) else out)[..., :8]
        return x


def stack(order: str) -> Any:
    return seeded(lambda: Stack(order))


def names(order: str) -> list[str]:
    return [f"{letter}{place}" for place, letter in enumerate(order)]


def config_for(order: str, **options: Any) -> LoRAConfig:
    targets = [name for name in names(order) if name[0] != "r"]
    parameters = ["weight_hh_l0"] if "r" in order else None
    return LoRAConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, "target_parameters": parameters} | options)


def ours(order: str, **options: Any) -> Any:
    net = stack(order)
    inject(net, config_for(order, **options))
    return fill_(net)


def theirs(order: str, path: Path | None = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names(order), **options)
        net = fill_(peft.get_peft_model(stack(order), config))
    if path is not None:
        net.save_pretrained(str(path))  # type: ignore[operator]
    return net


def by_peft(order: str, path: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        out: torch.Tensor = peft.PeftModel.from_pretrained(stack(order), path).eval()(X)
    return out


ORDERS = ["ml", "lm", "tm", "elmlm", "lr", "cl"]  # of layers, each by its letter, that PEFT's files hold
OPTIONS: list[dict[str, Any]] = [{}, {"init_lora_weights": "pissa"}, {"use_rslora": True}]


@pytest.mark.parametrize(("order", "options"), covering(ORDERS, OPTIONS, meet=1))
def test_peft_and_we_apply_our_adapter_alike(tmp_path, order: str, options: dict[str, Any]):
    net = ours(order, **options if "r" not in order else {})
    save_adapter(net, tmp_path)
    assert (net(X) - stack(order)(X)).abs().max() > 0.01
    torch.testing.assert_close(by_peft(order, tmp_path), net(X), rtol=1e-4, atol=1e-4)
    load_adapter(again := stack(order), tmp_path)
    close(again(X), net(X))


@pytest.mark.parametrize("order", ["cm", "mc", "ecmlm", "rc"])
def test_attention_or_a_parameter_beside_conv1d_is_not_written_in_pefts_form_and_other_forms_hold_it(tmp_path, order):
    net = ours(order)
    message = r": '[mr]\d\S*' is .* in a model with transformers' Conv1D, .*Save a Lightning checkpoint"
    for verb, write in {
        "save_adapter": lambda: save_adapter(net, tmp_path / "a"),
        "export_adapter": lambda: export_adapter(take_adapter(net), tmp_path / "a"),
        "combine": lambda: combine([take_adapter(net)], [1], output=tmp_path / "a"),
    }.items():
        with pytest.raises(LoRAError, match=f"^{verb}{message}"):
            write()
    assert not list(tmp_path.iterdir())
    load_adapter(again := stack(order), checkpoint(net, "adapter"))
    close(again(X), net(X))


@pytest.mark.parametrize(("order", "flag"), [("cm", True), ("mc", False), ("wml", False)])
def test_peft_folders_of_attention_beside_conv1d_are_refused(tmp_path, capsys, order: str, flag: bool):
    theirs(order, tmp_path / "a", fan_in_fan_out=flag)
    net = stack(order)
    for load in (lambda: load_adapter(net, tmp_path / "a"), lambda: load_adapter(net, read_adapter(tmp_path / "a"))):
        with pytest.raises(LoRAError, match=r"of attention.* transformers' Conv1D\. .*Merge it in PEFT"):
            load()
    assert net.state_dict().keys() == stack(order).state_dict().keys()
    torch.save(stack(order).state_dict(), tmp_path / "base.pt")
    files = ["--base", tmp_path / "base.pt", "--adapter", tmp_path / "a", "--output", tmp_path / "merged.pt"]
    if order != "mc":  # whose square weight does not say that it is transposed
        assert re.search("fan_in_fan_out=true|which is transformers' Conv1D", refused(capsys, "merge", *files))


def test_a_flag_of_peft_beside_attention_is_refused_without_a_model_too(tmp_path, capsys):
    theirs("tm", tmp_path / "a", fan_in_fan_out=True)
    for call in (["info", tmp_path / "a"], ["export", tmp_path / "a", tmp_path / "b"]):
        assert "of attention with fan_in_fan_out=true" in refused(capsys, *call)


def test_what_the_defaults_adapt_of_both_kinds_is_saved(tmp_path):
    net = stack("cml")
    assert inject(net, LoRAConfig(r=2, lora_alpha=3)) == ["c0", "l2"]
    save_adapter(fill_(net), tmp_path)
    close(by_peft("cml", tmp_path), net(X))
