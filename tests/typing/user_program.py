"""A user's program as type checkers see it: mypy and pyright, both strict, find what is wrong here and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from typing_extensions import assert_type

from lightning_lora import (
    LoRACallback,
    LoRACLI,
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    disable_adapter,
    inject,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merge,
    merge_and_unload,
    merged,
    merged_state_dict,
    save_adapter,
    save_merged,
    summary,
    unload,
    unmerge,
)


class Net(L.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)


def with_a_trainer(path: Path) -> None:
    callback = LoRACallback(r=4, target_modules=["body"], save="merged", rank_pattern={"body": 2})
    L.Trainer(callbacks=[callback, LoRACallback(LoRAConfig(r=8))])
    assert_type(load_from_checkpoint(Net, path, width=4), Net)
    assert_type(callback.config, LoRAConfig)
    LoRACLI(Net)


def without_one(path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    assert_type(inject(net, LoRAConfig(init_lora_weights="gaussian", bias="lora_only")), list[str])
    merge(net)
    assert_type(is_merged(net), bool)
    unmerge(net)
    with merged(net) as plain:
        assert_type(plain, nn.Module)
    with disable_adapter(net):
        net(torch.ones(1, 4))
    assert_type(adapter_state_dict(net), dict[str, Any])
    assert_type(merged_state_dict(net, dequantize=torch.bfloat16), dict[str, Any])
    save_adapter(net, path)
    save_adapter(net, str(path))
    load_adapter(net, path)
    save_merged(net, path / "merged", max_shard_bytes=10**9)
    assert_type(summary(net).trainable, int)
    assert_type(str(summary(net)), str)
    try:
        merge_and_unload(net)
    except LoRAError:
        unload(net)


def mistakes(net: nn.Module) -> None:
    LoRACallback(rank=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LoRACallback(save="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LoRAConfig(8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LoRAConfig(init_lora_weights=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LoRAConfig().r = 4  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    inject(net, r=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    save_adapter(net)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
