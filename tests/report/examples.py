"""The picture in lightning_lora/report/README.md, of a small adapter that is trained here; takes less than a minute.

python tests/report/examples.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject, plot_adapter

PICTURE = Path(__file__).with_name("adapter.png")
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def counting(step: int) -> torch.Tensor:
    """Texts that count on by `step`."""
    return (torch.arange(64)[:, None] + step * torch.arange(16)) % 64


def train(model: Any, texts: torch.Tensor, lr: float, steps: int) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=texts, labels=texts).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=6))
    print("base, counts by 1:", round(train(model, counting(1), 3e-3, 150), 3))
    inject(model, LoRAConfig(r=8, lora_alpha=16), seed=0)
    print("adapter, counts by 3:", round(train(model, counting(3), 3e-3, 150), 3))
    plot_adapter(model, output=PICTURE)
    Image.open(PICTURE).quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)  # small, for a repository


if __name__ == "__main__":
    main()
