"""Fits through launchers that start processes from this one; writes what the main process finds afterwards.

python -m support.runs.programs.launched_fits FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, LoRAConfig, inject, is_merged, load_adapter
from support.runs.training import Data, Net, assert_same_tensors

CONFIG = LoRAConfig(r=2, lora_alpha=4, target_modules=["body.0", "body.3", "head"], init_lora_weights=False)


class Synced(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0] * (1 + 9 * self.global_rank)  # so that the ranks find different errors
        self.log("val_loss", F.cross_entropy(self(x), batch[1]), sync_dist=True)


def trainer_for(folder: Path, strategy: str, devices: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def same(found: Any, expected: Any) -> bool:
    try:
        assert_same_tensors(found, expected)
    except AssertionError:
        return False
    return True


def injected(folder: Path, strategy: str, devices: int, save: Any) -> dict[str, Any]:
    model = Synced()
    inject(model, CONFIG)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    keep = ModelCheckpoint(folder / "kept", "a")
    trainer = trainer_for(folder, strategy, devices, LoRACallback(save=save), keep)
    trainer.fit(model, Data(4))
    last = torch.load(keep.best_model_path, weights_only=True)
    saved = last["lora"]["adapter"] if save == "merged" else last["state_dict"]
    trainer.save_checkpoint(folder / "after.ckpt")
    file = torch.load(folder / "after.ckpt", weights_only=True)
    again = Synced()
    inject(again, CONFIG)
    load_adapter(again, folder / "after.ckpt")
    after = model.state_dict()
    return {
        "saved": sorted(saved),
        "kind": file["lora"]["kind"],
        "as there": same(file["state_dict"], last["state_dict"]),
        "described as there": same(file["lora"], last["lora"]),
        "arrived": all(torch.equal(after[name], value) for name, value in saved.items()),
        "trained": not torch.equal(after["head.lora_B"], first["head.lora_B"]),
        "base": all(
            torch.equal(after[n], v) for n, v in first.items() if "lora" not in n and not n.startswith("body.1")
        ),
        "merged": is_merged(model),
        "saved after": all(torch.equal(again.state_dict()[name], value) for name, value in saved.items()),
    }


def validated(folder: Path, strategy: str) -> dict[str, float]:
    """Nothing comes back from an evaluation but its numbers, so that it needs no adapter here."""
    numbers = {}
    for merged_eval in (True, False):
        torch.manual_seed(0)
        callback = LoRACallback(merged_eval=merged_eval, **CONFIG.to_dict())
        found = trainer_for(folder, strategy, 1, callback).validate(Synced(), Data(), verbose=False)
        numbers[str(merged_eval)] = found[0]["val_loss"]
    return numbers


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("error", message="It is recommended to use")  # sync_dist=True
    root = Path(sys.argv[1])
    results = {
        "ddp_fork": injected(root / "fork", "ddp_fork", 2, "adapter"),
        "ddp_notebook": injected(root / "notebook", "ddp_notebook", 1, "merged"),
        "ddp_spawn": injected(root / "spawn", "ddp_spawn", 1, "full"),
        "validated": validated(root, "ddp_fork"),
    }
    (root / "results.json").write_text(json.dumps(results))
