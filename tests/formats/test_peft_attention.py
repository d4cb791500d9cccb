"""Attention and single parameters beside transformers' Conv1D. PEFT has one flag for all, which the order decides."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRAError, combine, inject, load_adapter, merged_state_dict, save_adapter
from lightning_lora.command.main import main
from lightning_lora.exchange.save_load import read_adapter
from lightning_lora.files.torch_archive import read_torch_file
from lightning_lora.formats.peft_attention import turn_as_in_model, turn_without_model
from lightning_lora.nn.low_rank import ATTENTION_OUTPUT
from support.notices import quiet_peers
from support.peers import close, config_of, edit, fill_, seeded

pytestmark = quiet_peers
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(6))
LAYERS: dict[str, Any] = {
    "l": lambda: nn.Linear(8, 8),
    "c": lambda: Conv1D(8, 8),
    "m": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "t": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "e": lambda: nn.Embedding(8, 8),
    "r": lambda: nn.LSTM(8, 8, batch_first=True),
}
ORDERS = ["cm", "mc", "ml", "cml", "lmc", "mcm", "tm", "ecmlm"]  # of layers, each by its letter


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
                x = x + (out[0] if isinstance(out, tuple) else out)
        return x


def stack(order: str) -> Any:
    return seeded(lambda: Stack(order))


def names(order: str) -> list[str]:
    return [f"{letter}{place}" for place, letter in enumerate(order)]


def config_for(order: str, **options: Any) -> LoRAConfig:
    targets = [name for name in names(order) if name[0] != "r"]
    parameters = ["weight_hh_l0"] if "r" in order else None
    return LoRAConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, "target_parameters": parameters} | options)


def ours(order: str, path: Path, **options: Any) -> Any:
    net = stack(order)
    inject(net, config_for(order, **options))
    fill_(net)
    save_adapter(net, path)
    return net


def theirs(order: str, path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names(order), **options)
        fill_(peft.get_peft_model(stack(order), config)).save_pretrained(str(path))  # type: ignore[operator]


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
    net = ours(order, tmp_path, **options)
    assert (net(X) - stack(order)(X)).abs().max() > 0.01
    torch.testing.assert_close(by_peft(order, tmp_path), net(X), rtol=1e-4, atol=1e-4)
    close(by_us(order, tmp_path), net(X))


@pytest.mark.parametrize("order", ["cm", "mc", "cml"])
def test_peft_applies_our_adapter_of_out_proj_alone_alike(tmp_path, order):
    targets = [f"{name}.out_proj" if name[0] == "m" else name for name in names(order)]
    net = ours(order, tmp_path, target_modules=targets)
    close(by_peft(order, tmp_path), net(X))
    close(by_us(order, tmp_path), net(X))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_we_apply_an_adapter_of_peft_as_it_loads_it(tmp_path, order, flag):
    theirs(order, tmp_path, fan_in_fan_out=flag)
    expected = by_peft(order, tmp_path)
    assert (expected - stack(order)(X)).abs().max() > 0.01
    close(by_us(order, tmp_path), expected)
    injected = stack(order)
    inject(injected, config_for(order, r=4))
    load_adapter(injected, tmp_path)
    close(injected(X), expected)


@pytest.mark.parametrize("order", ["cm", "mc", "cml", "ml"])
def test_our_adapter_stays_the_same_through_export_import_combine_and_merge(tmp_path, order):
    net = ours(order, tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    close(by_peft(order, tmp_path / "b"), net(X))
    assert main(["import", str(tmp_path / "a"), str(tmp_path / "c.ckpt")]) == 0
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


def test_an_adapter_of_peft_is_not_taken_without_the_model_that_tells_the_order(tmp_path, capsys):
    theirs("cm", tmp_path / "a", fan_in_fan_out=True)
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "depends on the order of the model's modules" in capsys.readouterr().err
    theirs("tm", tmp_path / "c", fan_in_fan_out=True)  # nothing but attention goes by the flag
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "d")]) == 0
    close(by_peft("tm", tmp_path / "d"), by_peft("tm", tmp_path / "c"))


def test_combined_adapters_of_out_proj_alone_keep_the_flag_and_what_it_means(tmp_path):
    """No Conv1D is among the layers, from which the flag would follow."""
    theirs("tm", tmp_path / "a", fan_in_fan_out=True)
    combine([tmp_path / "a"] * 2, [0.25, 0.75], output=tmp_path / "b")
    assert config_of(tmp_path / "b")["fan_in_fan_out"] is True
    expected = by_peft("tm", tmp_path / "a")
    close(by_peft("tm", tmp_path / "b"), expected)
    close(by_us("tm", tmp_path / "b"), expected)


def test_an_adapter_of_peft_is_turned_once(tmp_path):
    theirs("tm", tmp_path, fan_in_fan_out=True)
    once = turn_without_model(read_adapter(tmp_path), "a folder")
    (output,) = (name for name, kind in once.kinds.items() if kind == ATTENTION_OUTPUT)
    assert not torch.equal(once.factor(output, "lora_A"), read_adapter(tmp_path).factor(output, "lora_A"))
    for again in (turn_without_model(once, "a folder"), turn_as_in_model(once, once.kinds)):
        assert torch.equal(again.factor(output, "lora_A"), once.factor(output, "lora_A"))


def test_adapters_of_different_layers_are_combined_and_written_from_their_model(tmp_path):
    for name, targets in (("a", ["c0", "l1"]), ("b", ["l1", "m2"])):
        ours("clm", tmp_path / name, target_modules=targets)
    both = combine([tmp_path / "a", tmp_path / "b"], [1, 1])
    net = stack("clm")
    load_adapter(net, both)
    with pytest.raises(LoRAError, match=r"^save_adapter: adapters of different layers were combined"):
        combine([tmp_path / "a", tmp_path / "b"], [1, 1], output=tmp_path / "c")
    save_adapter(net, tmp_path / "d")
    close(by_peft("clm", tmp_path / "d"), net(X))


@pytest.mark.parametrize("order", ["rc", "cr", "rlc"])
def test_single_parameters_that_peft_refuses_after_a_conv1d_are_refused(tmp_path, order):
    with pytest.raises(LoRAError, match=r"^save_adapter: 'r\d.weight_hh_l0' is a parameter of a model whose last"):
        ours(order, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", ["rcl", "crl", "lr"])
def test_single_parameters_that_peft_takes_beside_a_conv1d_are_written(tmp_path, order):
    net = ours(order, tmp_path)
    close(by_peft(order, tmp_path), net(X))
    close(by_us(order, tmp_path), net(X))


def test_the_flag_beside_attention_is_refused_where_somebody_changed_it(tmp_path):
    net = ours("mc", tmp_path)
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    edit(tmp_path, fan_in_fan_out=False)
    assert (by_peft("mc", tmp_path) - net(X)).abs().max() > 0.01
    with pytest.raises(LoRAError, match=r"fan_in_fan_out=False does not go with .*fan_in_fan_out=True"):
        by_us("mc", tmp_path)


def test_extract_of_weights_stored_in_out_gives_a_folder_that_peft_reads(tmp_path):
    base = stack("cm")
    tuned = stack("cm")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(".weight"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    for name, net in (("base", base), ("tuned", tuned)):
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    files = ["--base", str(tmp_path / "base.pt"), "--tuned", str(tmp_path / "tuned.pt")]
    options = ["--rank", "8", "--fan-in-fan-out"]
    assert main(["extract", *files, *options, "--output", str(tmp_path / "a")]) == 0
    torch.testing.assert_close(by_us("cm", tmp_path / "a"), tuned(X), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(by_peft("cm", tmp_path / "a"), tuned(X), rtol=1e-3, atol=1e-3)


def test_merged_weights_of_an_adapter_of_peft_are_those_that_it_merges(tmp_path):
    theirs("cm", tmp_path, fan_in_fan_out=True)
    net = stack("cm")
    load_adapter(net, tmp_path)
    plain = stack("cm")
    plain.load_state_dict(merged_state_dict(net))
    close(plain(X), by_peft("cm", tmp_path))
