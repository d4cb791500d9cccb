"""Deploying: one tuned model as a folder for transformers, a folder for PEFT and a plain state dict.

pip install -e ".[examples]"
python examples/deploy.py
"""

import codecs
import contextlib
import io
from pathlib import Path

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRACallback, merged_state_dict, save_adapter, save_merged
from small_models import encode, manual_llama

RUNS = Path(__file__).with_name("runs")

with contextlib.redirect_stdout(io.StringIO()):
    import this  # prints itself when it is imported
ZEN = codecs.decode(this.s, "rot13")


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM.from_pretrained(manual_llama())

    def training_step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def zen() -> DataLoader[Tensor]:
    """The Zen of Python, over and over, in pieces of 128 characters."""
    return DataLoader(encode(ZEN * 12).split(128)[:-1], batch_size=16, shuffle=True)


def compare(name: str, network: nn.Module, tuned: nn.Module) -> None:
    """How far its outputs are from the tuned model's."""
    tokens = encode(ZEN)[None, :128]
    with torch.no_grad():
        difference = (network(input_ids=tokens).logits - tuned(input_ids=tokens).logits).abs().max()
    print(f"{name:<32}same outputs: {bool(difference < 1e-3)}")


if __name__ == "__main__":
    L.seed_everything(0)
    model = LanguageModel()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=20,
        callbacks=[LoRACallback(r=16, lora_alpha=32)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, zen())
    tuned = model.model.eval()
    start = encode("Beautiful is better")[None]
    print(bytes(tuned.generate(start, max_new_tokens=60, do_sample=False)[0].tolist()).decode())
    compare("the base, untrained", LlamaForCausalLM.from_pretrained(manual_llama()), tuned)

    save_merged(model, RUNS / "merged")  # transformers, vLLM and all else that reads a model's folder
    compare("merged, by from_pretrained", LlamaForCausalLM.from_pretrained(RUNS / "merged"), tuned)

    save_adapter(model, RUNS / "adapter")  # PEFT: small, needs the base
    base = LlamaForCausalLM.from_pretrained(manual_llama())
    compare("adapter, by peft", PeftModel.from_pretrained(base, RUNS / "adapter"), tuned)

    torch.save(merged_state_dict(model), RUNS / "merged.pt")  # PyTorch alone: the class of the model, plain weights
    plain = LanguageModel()
    plain.load_state_dict(torch.load(RUNS / "merged.pt", weights_only=True))
    compare("state dict, by load_state_dict", plain.model.eval(), tuned)
