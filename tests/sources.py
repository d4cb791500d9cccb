"""A trained model and the forms in which its adapter is handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain import Zoo, train, zoo_config
from torch import nn

from lightning_lora import adapter_state_dict, inject, save_adapter
from lightning_lora.adapter.lightning_checkpoint import convert_checkpoint as write


def base() -> Zoo:
    torch.manual_seed(1)
    return Zoo().eval()


def trained(**options: Any) -> Zoo:
    model = base()
    inject(model, zoo_config(**options))
    train(model)
    return model.eval()


def checkpoint(model: nn.Module, kind: Any) -> dict[str, Any]:
    """What Lightning would write; "bare" and "state" are what a user would by hand."""
    if kind == "bare":
        return adapter_state_dict(model)
    if kind == "state":
        return {"state_dict": adapter_state_dict(model), "epoch": 3}
    found = {"state_dict": model.state_dict(), "epoch": 3}
    write(model, found, kind)
    return found


def source(model: nn.Module, kind: str, form: str, path: Path) -> Any:
    if form == "folder":
        save_adapter(model, path / "adapter")
        return path / "adapter"
    if form == "file":
        torch.save(checkpoint(model, kind), path / "file.ckpt")
        return str(path / "file.ckpt")
    return checkpoint(model, kind)
