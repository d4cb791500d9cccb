"""loralib's files, which store no lora_alpha, through the command and through load_adapter."""

from __future__ import annotations

from pathlib import Path

import loralib
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter
from support.models.peers import call, refused


class Loralib(nn.Module):
    """Every linear kind of loralib."""

    def __init__(self) -> None:
        super().__init__()
        self.one = loralib.Linear(6, 5, r=2, lora_alpha=3)
        self.two = loralib.Linear(5, 4, r=4, lora_alpha=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(self.one(x).relu())
        return result


class Plain(nn.Module):
    def __init__(self, other: Loralib | None = None) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)
        if other is not None:
            self.load_state_dict({k: v for k, v in other.state_dict().items() if "lora_" not in k})

    forward = Loralib.forward


@pytest.fixture
def from_loralib(tmp_path: Path) -> Loralib:
    net = Loralib()
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    torch.save(Plain(net).state_dict(), tmp_path / "base.pt")
    return net


def test_loralib_file_without_lora_alpha_is_refused_with_the_remedy(tmp_path, capsys, from_loralib: Loralib):
    fresh = Plain(from_loralib)
    with pytest.raises(LoRAError, match=r"as loralib's files do\. Its factors have rank 2 and 4; lora_alpha is"):
        load_adapter(fresh, tmp_path / "lora.pt")
    inject(fresh, LoRAConfig(r=2, lora_alpha=3, rank_pattern={"two": 4}, target_modules=["one", "two"]))
    load_adapter(fresh, tmp_path / "lora.pt")
    x = torch.randn(3, 6)
    torch.testing.assert_close(fresh(x), from_loralib(x))
    shown = refused(capsys, "export", tmp_path / "lora.pt", tmp_path / "x")
    assert "Ask whoever trained it, and pass --lora-alpha to merge or export" in shown
    assert "lora_alpha must come from whoever trained it" in call(capsys, "info", tmp_path / "lora.pt")
    assert not (tmp_path / "x").exists()


def test_loralib_file_with_its_lora_alpha_is_exported_and_merged(tmp_path, capsys, from_loralib: Loralib):
    x = torch.randn(3, 6)
    expected = from_loralib(x)
    alpha = ["--lora-alpha", 3]
    call(capsys, "export", tmp_path / "lora.pt", tmp_path / "folder", *alpha)
    fresh = Plain(from_loralib)
    load_adapter(fresh, tmp_path / "folder")
    torch.testing.assert_close(fresh(x), expected)
    base = ["--base", tmp_path / "base.pt", "--output", tmp_path / "out.pt"]
    call(capsys, "merge", *base, "--adapter", tmp_path / "lora.pt", *alpha)
    fresh = Plain()
    fresh.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    torch.testing.assert_close(fresh(x), expected)
    shown = refused(capsys, "merge", *base, "--adapter", tmp_path / "folder", *alpha, "--overwrite")
    assert "stores its lora_alpha; it cannot be given another" in shown


def test_loralib_file_with_a_fused_projection_is_refused_by_the_command(tmp_path, capsys):
    net = nn.ModuleDict({"qkv": loralib.MergedLinear(6, 12, r=2, lora_alpha=3, enable_lora=[True, False, True])})
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    shown = refused(capsys, "export", tmp_path / "lora.pt", tmp_path / "x", "--lora-alpha=3")
    assert "parts of a fused projection" in shown
