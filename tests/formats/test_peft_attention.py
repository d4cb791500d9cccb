"""Attention and single parameters beside transformers' Conv1D: PEFT has one flag for all, which the order decides.

So PEFT's files do not hold the two here. Without a Conv1D they do.
"""

from __future__ import annotations

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
    adapter_state_dict,
    combine,
    export_adapter,
    inject,
    load_adapter,
    merged_state_dict,
    read_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.command.main import main
from lightning_lora.files.torch_archive import read_torch_file
from support.models import checkpoint
from support.notices import quiet_peers
from support.peers import close, fill_, refused, seeded

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
ORDERS = ["ml", "lm", "tm", "elmlm", "lr", "rl", "cl", "lc"]  # of layers, each by its letter, that PEFT's files hold
BESIDE = ["cm", "mc", "cml", "lmc", "ecmlm"]  # attention beside a Conv1D


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


def by_us(order: str, path: Any) -> torch.Tensor:
    net = stack(order)
    load_adapter(net, path)
    out: torch.Tensor = net(X)
    return out


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_peft_and_we_apply_our_adapter_alike(tmp_path, order, options):
    net = ours(order, **options if "r" not in order else {})
    save_adapter(net, tmp_path)
    assert (net(X) - stack(order)(X)).abs().max() > 0.01
    torch.testing.assert_close(by_peft(order, tmp_path), net(X), rtol=1e-4, atol=1e-4)
    close(by_us(order, tmp_path), net(X))


@pytest.mark.parametrize("order", ["ml", "tm", "lm"])
def test_we_apply_an_adapter_of_peft_as_it_loads_it(tmp_path, order):
    theirs(order, tmp_path)
    expected = by_peft(order, tmp_path)
    assert (expected - stack(order)(X)).abs().max() > 0.01
    close(by_us(order, tmp_path), expected)
    injected = stack(order)
    inject(injected, config_for(order, r=4))
    load_adapter(injected, tmp_path)
    close(injected(X), expected)


@pytest.mark.parametrize("order", [*BESIDE, "rc", "crl"])
def test_attention_or_a_parameter_beside_conv1d_is_not_written_in_pefts_form(tmp_path, order):
    net = ours(order)
    what = "a single parameter" if "r" in order else "attention"
    message = rf"^save_adapter: '[mr]\d\S*' is {what} beside transformers' Conv1D, .*Save a Lightning checkpoint"
    for write in (
        lambda: save_adapter(net, tmp_path / "a"),
        lambda: export_adapter(take_adapter(net), tmp_path / "a"),
        lambda: combine([take_adapter(net)], [1], output=tmp_path / "a"),
    ):
        with pytest.raises(LoRAError, match=message):
            write()
    assert not list(tmp_path.iterdir())


def test_extract_of_both_is_refused(tmp_path, capsys):
    base = stack("cm").state_dict()
    torch.save(base, tmp_path / "base.pt")
    tuned = {
        name: value + torch.randn(value.shape) if name.endswith(".weight") else value for name, value in base.items()
    }
    torch.save(tuned, tmp_path / "tuned.pt")
    files = ["--base", tmp_path / "base.pt", "--tuned", tmp_path / "tuned.pt", "--output", tmp_path / "a"]
    error = refused(capsys, "extract", *files, "--rank", "8", "--fan-in-fan-out")
    assert "'m1.out_proj' is attention beside transformers' Conv1D" in error


def test_out_proj_alone_beside_conv1d_is_not_written_in_pefts_form(tmp_path):
    with pytest.raises(LoRAError, match=r"^save_adapter: 'm1\.out_proj' is attention beside transformers' Conv1D"):
        save_adapter(ours("cm", target_modules=["c0", "m1.out_proj"]), tmp_path / "a")


@pytest.mark.parametrize("order", [*BESIDE, "rc", "crl"])
def test_our_other_forms_hold_attention_beside_conv1d(order):
    net = ours(order)
    close(by_us(order, take_adapter(net)), net(X))
    close(by_us(order, combine([take_adapter(net)] * 2, [0.25, 0.75])), net(X))
    plain, injected = stack(order), ours(order)
    plain.load_state_dict(merged_state_dict(net))
    torch.testing.assert_close(plain(X), net(X), rtol=1e-4, atol=1e-4)
    load_adapter(injected, adapter_state_dict(net))
    assert torch.equal(injected(X), net(X))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("order", BESIDE)
def test_peft_folders_of_attention_beside_conv1d_are_refused(tmp_path, order, flag):
    theirs(order, tmp_path / "a", fan_in_fan_out=flag)
    net, base = stack(order), stack(order)
    for load in (lambda: load_adapter(net, tmp_path / "a"), lambda: load_adapter(net, read_adapter(tmp_path / "a"))):
        with pytest.raises(LoRAError, match=r"of attention.* transformers' Conv1D\. .*Merge it in PEFT"):
            load()
    assert dict(net.state_dict()).keys() == dict(base.state_dict()).keys()


def test_a_state_dict_of_peft_of_attention_beside_conv1d_is_refused():
    injected = stack("cml")
    inject(injected, config_for("cml"))
    before = {name: value.clone() for name, value in injected.state_dict().items()}
    with pytest.raises(LoRAError, match=r"'m1\.out_proj' of attention, and 'c0', which is transformers' Conv1D"):
        load_adapter(injected, dict(theirs("cml").state_dict()))
    assert all(torch.equal(value, before[name]) for name, value in injected.state_dict().items())


def test_peft_is_not_read_otherwise_after_an_export_without_the_model(tmp_path):
    theirs("cml", tmp_path / "a")  # the last linear layer sets the flag to false
    export_adapter(tmp_path / "a", tmp_path / "b")
    for source in (tmp_path / "b", combine([tmp_path / "a"], [1])):
        with pytest.raises(LoRAError, match="which is transformers' Conv1D"):
            by_us("cml", source)


def test_merge_refuses_a_conv1d_that_it_finds_beside_attention_of_peft(tmp_path, capsys):
    theirs("wml", tmp_path / "a")
    torch.save(stack("wml").state_dict(), tmp_path / "base.pt")
    files = ["--base", tmp_path / "base.pt", "--adapter", tmp_path / "a", "--output", tmp_path / "merged.pt"]
    assert "'w0', which is transformers' Conv1D" in refused(capsys, "merge", *files)


@pytest.mark.parametrize("order", ["tm", "cm"])
def test_a_flag_of_peft_beside_attention_is_refused_by_every_reader(tmp_path, order, capsys):
    theirs(order, tmp_path / "a", fan_in_fan_out=True)
    for call in (["info", tmp_path / "a"], ["export", tmp_path / "a", tmp_path / "b"]):
        assert "of attention with fan_in_fan_out=true" in refused(capsys, *call)


def test_our_folder_of_both_from_before_the_refusal_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.formats.peft_folder.refuse_to_write_beside_conv1d", lambda adapter: None)
        save_adapter(ours("cm"), tmp_path)
    with pytest.raises(LoRAError, match="of attention with fan_in_fan_out=true"):
        by_us("cm", tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", "all-layers"])
def test_what_the_defaults_adapt_of_both_kinds_is_saved(tmp_path, targets):
    net = stack("cml")
    adapted = inject(net, LoRAConfig(r=2, lora_alpha=3, target_modules=targets))
    assert adapted == ["c0", "l2"]
    fill_(net)
    save_adapter(net, tmp_path)
    close(by_peft("cml", tmp_path), net(X))
    close(by_us("cml", tmp_path), net(X))


@pytest.mark.parametrize("order", ["ml", "lm"])
def test_our_adapter_stays_the_same_through_export_combine_and_merge(tmp_path, order):
    net = ours(order)
    save_adapter(net, tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    close(by_peft(order, tmp_path / "b"), net(X))
    torch.save(checkpoint(net, "adapter"), tmp_path / "c.ckpt")
    assert main(["export", str(tmp_path / "c.ckpt"), str(tmp_path / "d")]) == 0
    close(by_peft(order, tmp_path / "d"), net(X))
    combine([tmp_path / "a"] * 2, [0.25, 0.75], output=tmp_path / "e")
    close(by_peft(order, tmp_path / "e"), net(X))
    torch.save(stack(order).state_dict(), tmp_path / "base.pt")
    files = ["--base", str(tmp_path / "base.pt"), "--adapter", str(tmp_path / "a")]
    assert main(["merge", *files, "--output", str(tmp_path / "merged.pt")]) == 0
    merged = stack(order)
    merged.load_state_dict(read_torch_file(tmp_path / "merged.pt"))
    torch.testing.assert_close(merged(X), net(X), rtol=1e-4, atol=1e-4)
