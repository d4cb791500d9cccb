"""FSDP2: a model that is sharded over two processes is trained, evaluated merged and saved as plain weights.

pip install -e ".[examples]"
python examples/fsdp2.py

The processes are of this machine's CPU. On GPUs it is `accelerator="gpu", devices=8` and ModelParallelStrategy(8, 1).
"""

import argparse
import inspect
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, save_merged
from small_models import encode, manual_llama

RUNS = Path(__file__).with_name("runs")


class ShardedModel(L.LightningModule):
    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def configure_model(self) -> None:
        """Shard block by block; the callback has adapted the layers before, so that the adapter is sharded too."""
        if self.device_mesh is None or any(isinstance(p, DTensor) for p in self.parameters()):
            return  # in one process; or already sharded, in an earlier stage
        for block in self.model.model.layers:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def training_step(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self(tokens))

    def validation_step(self, tokens: Tensor) -> None:
        self.log("loss", self(tokens), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def python_code() -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    """The source of argparse, in pieces of 128 characters, to train on and to validate on."""
    pieces = encode(inspect.getsource(argparse)).split(128)[:-1]
    return (
        DataLoader(pieces[:640], batch_size=8, shuffle=True),
        DataLoader(pieces[640:704], batch_size=32),
    )


if __name__ == "__main__":  # each of the two processes runs all of this
    L.seed_everything(0)
    model, (train, validate) = ShardedModel(), python_code()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1),  # 2 shards, no tensor parallel
        max_epochs=2,
        num_sanity_val_steps=0,
        callbacks=[LoRACallback(r=16, lora_alpha=32)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = trainer.validate(model, validate, verbose=False)[0]["loss"]
    trainer.fit(model, train)
    after = trainer.validate(model, validate, verbose=False)[0]["loss"]
    save_merged(model, RUNS / "fsdp2")  # every process calls it; tensor by tensor, the first one writes
    if trainer.is_global_zero:
        weight = model.model.model.layers[0].mlp.down_proj.weight
        print(f"a weight of {tuple(weight.shape)}, of which each process holds {tuple(weight.to_local().shape)}")
        print(f"loss on Python code: {before:.2f} before, {after:.2f} after")
        plain = LlamaForCausalLM.from_pretrained(RUNS / "fsdp2")  # in one process
        tokens = next(iter(validate))
        with torch.no_grad():
            print(
                f"loss of the merged folder, loaded in one process: {plain(input_ids=tokens, labels=tokens).loss:.2f}"
            )
