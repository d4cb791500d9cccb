"""A LightningModule with PEFT inside, beside the same one with LoRACallback: python tests/benchmarks/run.py module

`PeftAndHooks` has the red lines of the diff on the front page. Compared are the lines that a user writes, the file that
ModelCheckpoint writes, what the Trainer does with that file, and the time of a validation by the Trainer. The model is
a Llama of transformers with random weights; a small CNN shows what becomes of BatchNorm's statistics.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from fit import NOTICES
from lightning.pytorch.callbacks import ModelCheckpoint
from measure import interleaved, milliseconds, ratio
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import report
from lightning_lora import LoRACallback, LoRAError, load_from_checkpoint

SEED, OTHER_SEED = 0, 1  # of the base; of another base with the same names and shapes
WIDTH, LAYERS, TOKENS, BATCH = 512, 4, 128, 4
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
RESULTS = report.HERE / "peft_in_module.json"
BEGIN, END = "<!-- module: written by tests/benchmarks/peft_in_module.py -->\n", "<!-- end of module -->"
HEADER = "| what | PEFT alone | PEFT and a hook that saves | PEFT and both hooks | LoRACallback |"
SAME, OTHER = "the same run", "another model, silently"  # than one that was not interrupted: every bit, or not
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Net(L.LightningModule):
    """What all candidates have in common."""

    model: Any

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, Tensor):
            tokens_loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            return tokens_loss
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        self.log("loss", self.loss(batch), batch_size=BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Plain(Net):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.model = base


class PeftAlone(Net):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


class PeftAndSaving(Net):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)


class PeftAndHooks(Net):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])


CANDIDATES: dict[str, type[Net]] = {
    "PEFT alone": PeftAlone,
    "PEFT and a hook that saves": PeftAndSaving,
    "PEFT and both hooks": PeftAndHooks,
    "LoRACallback": Plain,
}


class CNN(nn.Module):
    """Two linear layers behind a convolution and BatchNorm, whose statistics change while the adapter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 36, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu().flatten(1)
        logits: Tensor = self.head(self.hidden(x).relu())
        return logits


def llama(width: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": LAYERS, "vocab_size": 512}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).to(dtype)
    return model


def cnn(seed: int = SEED) -> nn.Module:
    torch.manual_seed(seed)
    return CNN()


def texts(count: int) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    rows: Any = torch.randint(512, (count * BATCH, TOKENS), generator=generator)
    return DataLoader(rows, BATCH)


def images(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(SEED)
    pixels = 3 + 2 * torch.randn(count * BATCH, 1, 8, 8, generator=generator)  # not of mean 0 and deviation 1
    return DataLoader([*zip(pixels, torch.arange(len(pixels)) % 10, strict=True)], BATCH)  # type: ignore[arg-type]


def make(name: str, base: nn.Module) -> Net:
    torch.manual_seed(SEED)  # of the adapter
    return CANDIDATES[name](base)  # type: ignore[call-arg]


def trainer(name: str, **options: Any) -> L.Trainer:
    lora = [LoRACallback(r=16, lora_alpha=32, verbose=False)] if name == "LoRACallback" else []
    callbacks = [*lora, *options.pop("callbacks", [])]
    options.setdefault("enable_checkpointing", False)
    return L.Trainer(callbacks=callbacks, **QUIET, **options)


# --- what is measured ---


def lines_of(name: str) -> int:
    """Lines that the plain program has not: of the module, and the argument of the Trainer."""
    if name == "LoRACallback":
        return 1
    of_plain = inspect.getsource(Plain).split("\n")
    lines = [line.replace("base: Any", "base: nn.Module") for line in inspect.getsource(CANDIDATES[name]).split("\n")]
    return len([line for line in lines[1:] if line.strip() and line not in of_plain])


def saved(name: str, base: nn.Module, data: DataLoader[Any], folder: Path) -> tuple[Net, Path]:
    """A module after an epoch, and the file that ModelCheckpoint has written of it."""
    writer = ModelCheckpoint(folder / name, filename="epoch")
    module = make(name, base)
    trainer(name, max_epochs=1, enable_checkpointing=True, callbacks=[writer]).fit(module, data)
    return module, Path(writer.best_model_path)


def resumed(name: str, path: Path, base: nn.Module, data: DataLoader[Any], whole: Net) -> str:
    """What a second epoch from this file leaves, compared with the uninterrupted run, or the error's type."""
    module = make(name, base)
    try:
        trainer(name, max_epochs=2).fit(module, data, ckpt_path=str(path), weights_only=False)
    except (RuntimeError, LoRAError) as error:
        return type(error).__name__
    one, two = module.state_dict(), whole.state_dict()
    return SAME if all(torch.equal(one[each], two[each]) for each in two) else OTHER


def facts(name: str, width: int, folder: Path) -> dict[str, Any]:
    """What one candidate does, but for its speed."""
    base, data = llama(width), texts(4)
    module, path = saved(name, copy.deepcopy(base), data, folder)
    whole = make(name, copy.deepcopy(base))
    trainer(name, max_epochs=2).fit(whole, data)
    names = [f"model.{each}" for each in base.state_dict()]
    return {
        "lines": lines_of(name),
        "bytes": path.stat().st_size,
        "names kept": len({*names} & {*module.state_dict()}),
        "names": len(names),
        "resumed": resumed(name, path, copy.deepcopy(base), data, whole),
        "on another base": resumed(name, path, llama(width, seed=OTHER_SEED), data, whole),
        "BatchNorm": batch_norm(name, folder / "cnn"),
    }


@torch.no_grad()
def batch_norm(name: str, folder: Path) -> float | str:
    """How far the outputs of the CNN, loaded from its checkpoint, are from those that were trained: 0 is the same."""
    module, path = saved(name, cnn(), images(8), folder)
    loaded = make(name, cnn())
    try:
        if name == "LoRACallback":
            loaded = load_from_checkpoint(Plain, path, base=cnn())
        else:
            loaded = type(loaded).load_from_checkpoint(path, base=cnn(), weights_only=False)
    except RuntimeError as error:
        return type(error).__name__
    x = next(iter(images(8)))[0]
    before, after = (each.eval().model(x).detach() for each in (module, loaded))  # a fit leaves gradients enabled
    return float((after - before).norm() / before.norm())


def validation(dtype: torch.dtype, width: int, batches: int, seconds: float) -> dict[str, float]:
    """Milliseconds of a batch of Trainer.validate with the callback, and ratios of its time to the plain base's."""
    base = llama(width, dtype)
    modules = {"plain": Plain(copy.deepcopy(base)), "PEFT": make("PEFT alone", copy.deepcopy(base))}
    modules["LoRACallback"] = make("LoRACallback", copy.deepcopy(base))
    data = texts(batches)
    for name in ("PEFT", "LoRACallback"):
        trainer(name, max_steps=1).fit(modules[name], texts(1))  # so that there is something to merge
    calls = {
        name: lambda name=name: trainer(name).validate(modules[name], data, verbose=False)  # type: ignore[misc]
        for name in modules
    }
    times = interleaved(calls, seconds, "cpu")
    found = {f"{name} / plain": ratio(times, [name], ["plain"]) for name in ("PEFT", "LoRACallback")}
    return {"ms": milliseconds(times, "LoRACallback") / batches, **found}


def measured(width: int = WIDTH, batches: int = 25, seconds: float = 90.0) -> dict[str, Any]:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        rows = [{"candidate": name, **facts(name, width, Path(folder))} for name in CANDIDATES]
        times = [{"dtype": name, **validation(dtype, width, batches, seconds)} for name, dtype in DTYPES.items()]
    sizes = {"width": width, "layers": LAYERS, "tokens": TOKENS, "batch": BATCH, "batches": batches}
    return {"seeds": [SEED, OTHER_SEED], **sizes, "validation": times, "rows": rows}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice about a small run, and what rounding costs, which is not measured here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                *NOTICES,
                "You defined a `validation_step` but have no `val_dataloader`",
                ".*merged 16-bit",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)


# --- the table ---


def markdown(content: dict[str, Any]) -> str:
    rows = {row["candidate"]: row for row in content["rows"]}

    def line(title: str, figure: Any) -> str:
        return f"| {title} | {' | '.join(str(figure(rows[name])) for name in CANDIDATES)} |"

    def ratios(row: dict[str, Any]) -> str:
        name = "LoRACallback" if row["candidate"] == "LoRACallback" else "PEFT"
        return ", ".join(f"{each[f'{name} / plain']:.2f}" for each in content["validation"])

    dtypes = ", ".join(each["dtype"] for each in content["validation"])
    lines = [
        line("lines of glue", lambda row: row["lines"]),
        line("bytes of the checkpoint", lambda row: f"{row['bytes']:,}"),
        line("names of the base that stay", lambda row: f"{row['names kept']} of {row['names']}"),
        line("resuming gives", lambda row: row["resumed"]),
        line("resuming on another base gives", lambda row: row["on another base"]),
        line("a CNN with BatchNorm, loaded again, gives", lambda row: _difference(row["BatchNorm"])),
        line(f"time of a validation, over the plain model's ({dtypes})", ratios),
    ]
    return "\n".join([f"{content['machine']}, {content['date']}:", "", HEADER, "|---|---|---|---|---|", *lines])


def _difference(found: float | str) -> str:
    if isinstance(found, str):
        return found
    return f"{100 * found:.0f} % off" if found else "the same"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of validations, for each dtype")
    parser.add_argument("--rewrite", action="store_true", help="write the table of the results that are kept")
    given = parser.parse_args(arguments)
    if not given.rewrite:
        torch.set_num_threads(1)
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "peft", "transformers"))
        machine = f"CPU, 1 thread, Python {platform.python_version()}, {packages}"
        content = {"machine": machine, "date": date.today().isoformat(), **measured(seconds=given.seconds)}
        RESULTS.write_text(report.as_json(content))
    content = json.loads(RESULTS.read_text())
    report.README.write_text(report.between(report.README.read_text(), BEGIN, END, markdown(content)))
    print(markdown(content))


if __name__ == "__main__":
    main()
