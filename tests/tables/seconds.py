"""Seconds that grow with the number of layers: to inject, to start a fit, to save and to load an adapter.

    python tests/tables/seconds.py     # measure, print the table and write it into large_models.md

Models have the names and the number of layers of Llama 3. Injection sees the true shapes, on the meta device. For the
rest widths are tiny, so that no time depends on a weight's size. test_many_layers.py counts calls instead.
"""

from __future__ import annotations

import gc
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, LoRAConfig, inject, load_adapter

sys.path.append(str(Path(__file__).parents[1]))
from support.ranks.scale import MODELS, Llama, markdown
from support.runs.training import make_trainer

PAGE = Path(__file__).parents[1] / "distributed" / "large_models.md"
BEGIN, END = "<!-- seconds: written by tests/tables/seconds.py -->\n", "<!-- end of seconds -->"
HEADS = ["model", "adapted layers", "inject", "a fit starts", "without LoRA", "save", "load"]
OPTIONS: dict[str, Any] = {"r": 16, "target_modules": "all-linear"}
HEAD_WIDTH, REPEATS = 128, 3


def small(blocks: int) -> LlamaConfig:
    """So many blocks of tiny widths."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaConfig(num_hidden_layers=blocks, **sizes)


def large(model: Llama) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=model.blocks,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_attention_heads=model.hidden // HEAD_WIDTH,
        num_key_value_heads=model.keys // HEAD_WIDTH,
        vocab_size=model.vocabulary,
    )


class Model(L.LightningModule):
    """A language model, which notes when its first batch comes."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = LlamaForCausalLM(config)
        self.on_first_batch: Callable[[], None] = lambda: None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.on_first_batch()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.lm(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


def fitting(config: LlamaConfig, path: Path, *callbacks: L.Callback) -> tuple[Callable[[], None], Model, L.Trainer]:
    """A fit of one batch."""
    model, trainer = Model(config), make_trainer(path, *callbacks, max_steps=1)
    rows = DataLoader(torch.arange(4).view(1, 4))
    return lambda: trainer.fit(model, rows), model, trainer


def seconds(work: Callable[[], Any]) -> float:
    """Of this process, so that others on the machine do not count."""
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def injecting(config: LlamaConfig) -> tuple[float, int]:
    """On the meta device; and how many layers it adapts."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    taken = seconds(lambda: inject(model, LoRAConfig(**OPTIONS)))
    return taken, len(inject(model, LoRAConfig(**OPTIONS)))


def until_first_batch(config: LlamaConfig, path: Path, *callbacks: L.Callback) -> float:
    """Seconds from the call of fit to the first batch."""
    fit, model, _ = fitting(config, path, *callbacks)
    came: list[float] = []
    gc.collect()
    model.on_first_batch = lambda: came.append(time.process_time())
    begin = time.process_time()
    fit()
    return came[0] - begin


def saving(config: LlamaConfig, path: Path) -> float:
    fit, _, trainer = fitting(config, path, LoRACallback(**OPTIONS))
    fit()
    return seconds(lambda: trainer.save_checkpoint(path / "adapter.ckpt"))


def loading(config: LlamaConfig, path: Path) -> float:
    """What saving has saved, onto a plain model."""
    model = Model(config)
    return seconds(lambda: load_adapter(model, path / "adapter.ckpt"))


def median(measure: Callable[[], float]) -> str:
    return f"{statistics.median(measure() for _ in range(REPEATS)):.2f} s"


def line(model: Llama, path: Path) -> list[str]:
    """What the table has of one model."""
    config = small(model.blocks)
    return [
        model.name,
        str(injecting(large(model))[1]),
        median(lambda: injecting(large(model))[0]),
        median(lambda: until_first_batch(config, path, LoRACallback(**OPTIONS))),
        median(lambda: until_first_batch(config, path)),
        median(lambda: saving(config, path)),
        median(lambda: loading(config, path)),
    ]


def main() -> None:
    """Measure all lines."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = [line(model, Path(folder)) for model in MODELS]
    text = markdown([HEADS, ["---"] * len(HEADS), *lines])
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    main()
