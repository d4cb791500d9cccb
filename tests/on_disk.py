"""Bases as files, and the command as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interchange import model
from safetensors.torch import load_file

from lightning_lora import load_adapter, merged_state_dict
from lightning_lora.command.main import main


def base_folder(name: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A sharded folder with files beside the weights."""
    model(name).to(dtype).save_pretrained(path, max_shard_size="12KB")  # type: ignore[operator]
    (path / "tokenizer.json").write_text("{}")
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text("notes")
    return path


def in_memory(name: str, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    net = model(name).to(dtype)
    load_adapter(net, adapter)
    return merged_state_dict(net)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def call(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command prints when it succeeds."""
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main([str(arg) for arg in args]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err
