"""What adapting the digits cost and gained: the report that digits.py prints."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, cast
from unittest.mock import Mock, patch

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_lora import LoRACallback, disable_adapter, load_from_checkpoint, merged
from lightning_lora.nn.conv import LoRAConv
from lightning_lora.nn.linear import LoRALinear

Images = tuple[Tensor, Tensor]  # (n, 1, 8, 8) and (n,) labels


def report_accuracy(module: nn.Module, test: Images, upright: Images, baseline: nn.Module) -> None:
    """What the adapter gains on the new task, and that the old one is still there."""
    with disable_adapter(module):
        show("mirrored digits, before", accuracy(module, test))
    show("mirrored digits, only the head trained", accuracy(baseline, test))
    show("mirrored digits, LoRA", accuracy(module, test))
    with disable_adapter(module):
        show("upright digits, adapter disabled", accuracy(module, upright))


def report_merging(module: nn.Module, test: Images) -> None:
    """How far merging changes outputs, beside how far the adapter does."""
    factored = logits(module, test)
    with merged(module):
        show("mirrored digits, LoRA merged", accuracy(module, test))
        difference = (logits(module, test) - factored).abs().max()
    with disable_adapter(module):
        effect = (logits(module, test) - factored).abs().max()
    show("outputs: largest change by merging", f"{difference:.1e}")
    show("outputs: largest change by the adapter", f"{effect:.1e}")


def report_trainer(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """What the Trainer measures, and which forward ran: the adapters' or only the plain layers'."""
    show("trainer.test, accuracy", f"{trainer.test(module, data, verbose=False)[0]['accuracy']:.3f}")
    with (
        counting((LoRAConv, "factored_forward"), (LoRALinear, "factored_forward")) as factored,
        counting((nn.Conv2d, "forward"), (nn.Linear, "forward")) as base,
    ):
        trainer.validate(module, data, verbose=False)
    show("trainer.validate, batches", len(data.val_dataloader()))
    show("trainer.validate, factored forward calls", sum(mock.call_count for mock in factored))
    show("trainer.validate, base forward calls", sum(mock.call_count for mock in base))


def report_sizes(module: L.LightningModule, data: L.LightningDataModule, test: Images, folder: Path) -> None:
    """What is trained and saved, and that the small checkpoint is enough."""
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    show("parameters, trainable", f"{trainable:,} of {total:,} ({trainable / total:.1%})")
    adapter, full = save(module, data, "adapter", folder), save(module, data, "full", folder)
    show("checkpoint, adapter", f"{adapter.stat().st_size:,} bytes")
    show("checkpoint, full", f"{full.stat().st_size:,} bytes")
    loaded = load_from_checkpoint(type(module), adapter)
    show("checkpoint, same outputs when loaded", torch.equal(logits(loaded, test), logits(module, test)))


def show(label: str, value: object) -> None:
    print(f"{label:<42}{value}")


@torch.no_grad()
def logits(module: nn.Module, data: Images) -> Tensor:
    return cast(Tensor, module.eval()(data[0]))


def accuracy(module: nn.Module, data: Images) -> str:
    return f"{multiclass_accuracy(logits(module, data), data[1], num_classes=10, average='micro'):.3f}"


@contextmanager
def counting(*methods: tuple[type, str]) -> Iterator[list[Mock]]:
    """Count calls of methods, which work as before."""
    with ExitStack() as stack:
        spies = [patch.object(cls, name, autospec=True, side_effect=getattr(cls, name)) for cls, name in methods]
        yield [stack.enter_context(spy) for spy in spies]


def save(
    module: L.LightningModule, data: L.LightningDataModule, kind: Literal["adapter", "full"], folder: Path
) -> Path:
    """A checkpoint of that kind, without optimizer, from a Trainer that adopts the adapted module."""
    trainer = L.Trainer(accelerator="cpu", callbacks=[LoRACallback(save=kind)], logger=False, enable_progress_bar=False)
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(folder / f"{kind}.ckpt", weights_only=True)
    return folder / f"{kind}.ckpt"
