"""Seconds that grow with the number of layers: to inject, to start a fit, to save and to load an adapter.

    python tests/tables/seconds.py     # measure, print the table and write it into large_models.md

Models have the names and the number of layers of Llama 3. Injection sees the true shapes, on the meta device. For the
rest widths are tiny, so that no time depends on a weight's size. test_seconds.py counts calls instead.
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
from support.scale import MODELS, Llama, markdown
from support.training import make_trainer

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


class Steps:
    """The four works on one model, each a function to time or to count."""

    def __init__(self, config: LlamaConfig, path: Path) -> None:
        self.config, self.path = config, path

    def injecting(self) -> tuple[Callable[[], list[str]], int]:
        """On the meta device, and how many layers it adapts."""
        with torch.device("meta"):
            model, again = LlamaForCausalLM(self.config), LlamaForCausalLM(self.config)
        return lambda: inject(model, LoRAConfig(**OPTIONS)), len(inject(again, LoRAConfig(**OPTIONS)))

    def fitting(self, *callbacks: L.Callback) -> tuple[Callable[[], None], Model, L.Trainer]:
        """A fit of one batch."""
        model, trainer = Model(self.config), make_trainer(self.path, *callbacks, max_steps=1)
        rows = DataLoader(torch.arange(4).view(1, 4))
        return lambda: trainer.fit(model, rows), model, trainer

    def saving(self) -> Callable[[], None]:
        fit, _, trainer = self.fitting(LoRACallback(**OPTIONS))
        fit()
        return lambda: trainer.save_checkpoint(self.path / "adapter.ckpt")

    def loading(self) -> Callable[[], None]:
        """What saving has saved, onto a plain model."""
        model = Model(self.config)
        return lambda: load_adapter(model, self.path / "adapter.ckpt")


def seconds(work: Callable[[], Any]) -> float:
    """Of this process, so that others on the machine do not count."""
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def until_first_batch(steps: Steps, *callbacks: L.Callback) -> float:
    """Seconds from the call of fit to the first batch."""
    fit, model, _ = steps.fitting(*callbacks)
    came: list[float] = []
    gc.collect()
    model.on_first_batch = lambda: came.append(time.process_time())
    begin = time.process_time()
    fit()
    return came[0] - begin


def median(measure: Callable[[], float]) -> str:
    return f"{statistics.median(measure() for _ in range(REPEATS)):.2f} s"


def line(model: Llama, path: Path) -> list[str]:
    """What the table has of one model."""
    layers = Steps(large(model), path).injecting()[1]
    steps = Steps(small(model.blocks), path)
    return [
        model.name,
        str(layers),
        median(lambda: seconds(Steps(large(model), path).injecting()[0])),
        median(lambda: until_first_batch(steps, LoRACallback(**OPTIONS))),
        median(lambda: until_first_batch(steps)),
        median(lambda: seconds(steps.saving())),
        median(lambda: seconds(steps.loading())),
    ]


def shown() -> str:
    """The table that large_models.md has."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


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
