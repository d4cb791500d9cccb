"""DeepSpeed's ZeRO on two processes: trained, evaluated merged, saved as a file that one process loads.

pip install -e ".[examples,deepspeed]"
python examples/deepspeed_zero.py
python examples/deepspeed_zero.py --stage 3

The processes are of this machine's CPU. On GPUs it is `accelerator="gpu", strategy="deepspeed_stage_2"`, or
"deepspeed_stage_3", which divides the model too.
"""

import argparse
import inspect
import os
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, load_from_checkpoint
from small_models import encode, manual_llama

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported; leave it out on GPUs
try:
    import deepspeed
except ImportError as error:
    remedy = 'run pip install -e ".[examples,deepspeed]"'
    raise SystemExit(f"deepspeed_zero.py: DeepSpeed is not installed; {remedy}.") from error

RUNS = Path(__file__).with_name("runs")


class OnCPU(DeepSpeedStrategy):
    """To try this without a GPU, because Lightning's strategy refuses a CPU. On GPUs its name is enough."""

    def setup_environment(self) -> None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, which takes minutes
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        self._init_config_if_needed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed wants an index


class LanguageModel(L.LightningModule):
    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def training_step(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self(tokens))

    def validation_step(self, tokens: Tensor) -> None:
        self.log("loss", self(tokens), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)


def python_code() -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    """The source of argparse, in pieces of 128 characters, to train on and to validate on."""
    pieces = encode(inspect.getsource(argparse)).split(128)[:-1]
    return (
        DataLoader(pieces[:640], batch_size=8, shuffle=True),
        DataLoader(pieces[640:704], batch_size=32),
    )


if __name__ == "__main__":  # each of the two processes runs all of this
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    stage = arguments.parse_args().stage
    L.seed_everything(0)
    model, (train, validate) = LanguageModel(), python_code()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=OnCPU(stage=stage),
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
    file = RUNS / f"deepspeed_stage_{stage}.ckpt"
    trainer.save_checkpoint(file)  # every process calls it, and sends its part to the first, which writes
    after = trainer.validate(model, validate, verbose=False)[0]["loss"]
    with deepspeed.zero.GatheredParameters([*model.parameters()]):  # what stage 3 has divided, for the comparison below
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if trainer.is_global_zero:
        print(f"loss on Python code: {before:.2f} before, {after:.2f} after")
        print(f"the checkpoint: {file.stat().st_size:,} bytes")
        plain = load_from_checkpoint(LanguageModel, file)  # in one process, without DeepSpeed
        with torch.no_grad():
            print(f"loss of that file, loaded in one process: {plain(next(iter(validate))):.2f}")
        same = all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in weights.items())
        print(f"the same weights in every bit: {same}")
