"""The pictures in lightning_lora/report/README.md, of small adapters that are trained here; takes about a minute.

python tests/report/examples.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject, plot_adapter

HERE = Path(__file__).parent
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
    base = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=6))
    print("base, counts by 1:", round(train(base, counting(1), 3e-3, 150), 3))
    tuned = {}
    for name, step, seed in (("3", 3, 0), ("3 again", 3, 1), ("5", 5, 0)):
        model = tuned[name] = copy.deepcopy(base)
        inject(model, LoRAConfig(r=8, lora_alpha=16), seed=seed)
        print(f"adapter, counts by {name}:", round(train(model, counting(step), 3e-3, 150), 3))
    plot_adapter(tuned["3"], output=HERE / "adapter.png")
    plot_adapter(tuned["3"], tuned["3 again"], output=HERE / "comparison.png")
    for file in (HERE / "adapter.png", HERE / "comparison.png"):  # with fewer colours, for a repository
        Image.open(file).quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    for name, model in tuned.items():
        print(name, {key: figure.get_suptitle() for key, figure in plot_adapter(model).items()})


if __name__ == "__main__":
    main()
