"""The model and the runs whose files version 0.1.0 wrote; they lie in tests/adapter/earlier.

Run as a program, with that version installed, it writes them anew: python tests/support/earlier.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, merged, save_adapter, save_merged

OPTIONS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["embed", "qkv", "conv", "out"],
    "modules_to_save": ["head"],
    "bias": "lora_only",
    "rank_pattern": {"out": 3},
    "enable_lora": {"qkv": [True, False, True]},
}
PART: dict[str, Any] = {"r": 2, "target_modules": ["qkv", "out"], "bias": "all"}
KINDS: tuple[Literal["adapter", "merged", "full"], ...] = ("adapter", "merged", "full")


class Network(nn.Module):
    """One layer of most kinds, a BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.qkv = nn.Linear(8, 24)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, dim=-1)
        x = self.norm(self.conv((q * k + v).transpose(1, 2))).transpose(1, 2)
        result: torch.Tensor = self.head(self.out(x).mean(1))
        return result


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = Network()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(tokens)
        return result

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def tokens() -> torch.Tensor:
    """(16, 5), each of the ten."""
    return torch.arange(80).mul(7).remainder(10).view(16, 5)


def fit(
    model: Net, path: Path, *callbacks: L.Callback, epochs: int = 2, resume: Path | None = None, **options: Any
) -> L.Trainer:
    """Train in a few steps, the same in each run."""
    data = DataLoader(TensorDataset(tokens(), tokens().sum(1) % 2), batch_size=8)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=path, callbacks=list(callbacks), **quiet, **options
    )
    trainer.fit(model, data, ckpt_path=resume)
    return trainer


def state(model: Net) -> dict[str, torch.Tensor]:
    """What must come back: what training changed, merged weights and outputs."""
    model.eval()
    values = {f"adapter.{name}": value.clone() for name, value in adapter_state_dict(model).items()}
    values["unmerged"] = model(tokens()).detach()
    with merged(model):
        values |= {f"merged.{name}": value.detach().clone() for name, value in model.named_parameters()}
        values["outputs"] = model(tokens()).detach()
    return values


def write(folder: Path) -> None:
    """Write one set of files."""
    torch.set_num_threads(1)
    for kind in KINDS:
        torch.manual_seed(0)
        trainer = fit(model := Net(), folder, LoRACallback(save=kind, **OPTIONS), enable_checkpointing=False)
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
    save_file(state(model), folder / "expected.safetensors")
    save_adapter(model, folder / "peft")
    save_merged(model, folder / "merged")
    torch.manual_seed(0)
    part = Net()
    inject(part.net, LoRAConfig(**PART))
    trainer = fit(part, folder, LoRACallback(save="full"), enable_checkpointing=False)
    trainer.save_checkpoint(folder / "part.ckpt", weights_only=True)
    save_file(state(part), folder / "part.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
