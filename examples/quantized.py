"""A quantized base: QLoRA on a Llama in 4 bits, saved as an adapter and as plain weights.

pip install -e ".[examples,quantized]"
python examples/quantized.py
"""

import argparse
import inspect
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, save_adapter, save_merged
from small_models import encode, manual_llama

RUNS = Path(__file__).with_name("runs")


class QuantizedModel(L.LightningModule):
    """The base's linear layers are in nf4 with double quantization; the adapter is in float32."""

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        self.model = LlamaForCausalLM.from_pretrained(
            manual_llama(), quantization_config=nf4, dtype=torch.bfloat16, device_map="cpu"
        )

    def training_step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def validation_step(self, tokens: Tensor) -> None:
        self.log("loss", self.training_step(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def python_code() -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    """The source of argparse, in pieces of 128 characters, to train on and to validate on."""
    pieces = encode(inspect.getsource(argparse)).split(128)[:-1]
    cut = len(pieces) * 9 // 10
    return (
        DataLoader(pieces[:cut], batch_size=16, shuffle=True),
        DataLoader(pieces[cut:], batch_size=64),
    )


if __name__ == "__main__":
    L.seed_everything(0)
    model, (train, validate) = QuantizedModel(), python_code()
    trainer = L.Trainer(
        accelerator="cpu",
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
    print(f"loss on Python code: {before:.2f} before, {after:.2f} after")

    save_adapter(model, RUNS / "quantized_adapter")  # for the base in 4 bits, here or in PEFT
    save_merged(model, RUNS / "quantized_merged", dequantize="bfloat16")  # for transformers, without quantization
    plain = LlamaForCausalLM.from_pretrained(RUNS / "quantized_merged", dtype=torch.bfloat16)
    tokens = next(iter(validate))
    with torch.no_grad():
        print(f"loss of the plain merged model: {plain(input_ids=tokens, labels=tokens).loss:.2f}")
    print(
        "a weight:",
        type(model.model.model.layers[0].mlp.down_proj).__name__,
        "->",
        type(plain.model.layers[0].mlp.down_proj).__name__,
    )
