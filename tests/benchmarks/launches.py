"""What a GPU is asked to do in a step and in a merge cycle: counted on a pretended device, beside peft.

    python tests/benchmarks/run.py launches   # print the table and write it into README.md beside this file

Per layer, over the frozen network with a backward to its input (the "floor").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import against
from peft import LoraConfig, get_peft_model
from torch import nn

import report
from lightning_lora import LoRAConfig, inject, merge, unmerge

sys.path.append(str(Path(__file__).parents[1]))
from support.devices.places import Count, count
from support.devices.pretend_device import pretend_device

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- launches: written by tests/benchmarks/launches.py -->\n", "<!-- end of launches -->"
WIDTH, RANK, ROWS, LAYERS = 256, 4, 64, 4
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Build = Callable[[], nn.Module]


class Tables(nn.Module):
    """Embeddings of the same tokens, summed."""

    def __init__(self, layers: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(WIDTH, WIDTH, padding_idx) for _ in range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(tokens) for table in self.tables]).sum(0)


def chain(layer: Build) -> Callable[[int], nn.Module]:
    return lambda layers: nn.Sequential(*(layer() for _ in range(layers)))


LINEAR = chain(lambda: nn.Linear(WIDTH, WIDTH))


CONVOLUTIONS = chain(lambda: nn.Conv2d(32, 32, 3, padding=1))


def features() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH)


def images() -> torch.Tensor:
    return torch.randn(4, 32, 8, 8)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        options: of LoRAConfig.
        peft: makes peft's config for these layers.
        network: makes the network with this number of layers.
        x: makes an input of it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    peft: Callable[..., Any] = LoraConfig
    network: Callable[[int], nn.Module] = LINEAR
    x: Callable[[], torch.Tensor] = features


KINDS = (nn.Linear, nn.Embedding, nn.Conv2d)
TABLE = {
    "LoRA": Row(),
    "LoRA, dropout": Row({"lora_dropout": 0.1}, partial(LoraConfig, lora_dropout=0.1)),
    "DoRA": Row({"use_dora": True}, partial(LoraConfig, use_dora=True)),
    "PiSSA (peft: plain)": Row({"init_lora_weights": "pissa"}),
    "LoRA, Conv2d": Row(network=CONVOLUTIONS, x=images),
    "LoRA, Embedding, padding": Row(network=partial(Tables, padding_idx=0), x=lambda: torch.arange(ROWS)),
}


def targets(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, KINDS)]


@torch.no_grad()
def fill_(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def adapted(row: Row, base: Build, ours: bool) -> nn.Module:
    """The network with our adapters, or with peft's."""
    model: Any = base()
    names = targets(model)
    if ours:
        inject(model, LoRAConfig(r=RANK, target_modules=names, **row.options))
    else:
        model = get_peft_model(model, row.peft(r=RANK, target_modules=names))
    fill_(model)
    return model.train()  # type: ignore[no-any-return]


def step(model: nn.Module, x: torch.Tensor, to_input: bool = False) -> None:
    x = x.detach().requires_grad_(to_input and x.is_floating_point())
    out = model(x)
    if out.requires_grad:
        out.sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def cycle(model: Any, ours: bool) -> None:
    """A merge and an unmerge."""
    if ours:
        merge(model)
        unmerge(model)
    else:
        model.merge_adapter()
        model.unmerge_adapter()


@dataclass(frozen=True)
class Counts:
    """What one line shows: of a step over the floor and of a merge cycle, ours and peft's."""

    step: Count
    cycle: Count
    peft_step: Count
    peft_cycle: Count


def counted(work: Callable[[], None]) -> Count:
    work()  # the first one makes what is kept
    return count(work)


def counts(row: Row, dtype: torch.dtype, layers: int = LAYERS) -> Counts:
    """Count for one line, on the pretended device."""
    with pretend_device() as device:
        torch.manual_seed(0)
        x = row.x().to(device)
        x = x.to(dtype) if x.is_floating_point() else x

        def base() -> nn.Module:
            return row.network(layers).to(dtype).to(device)

        frozen = base().requires_grad_(False)
        floor = counted(lambda: step(frozen, x, to_input=True))
        ours, theirs = (adapted(row, base, ours=is_ours) for is_ours in (True, False))
        steps = [counted(lambda model=model: step(model, x)) - floor for model in (ours, theirs)]
        cycles = [counted(lambda: cycle(ours, ours=True)), counted(lambda: cycle(theirs, ours=False))]
    return Counts(steps[0], cycles[0], steps[1], cycles[1])


def all_counts() -> dict[tuple[str, str], Counts]:
    return {(name, dtype): counts(row, DTYPES[dtype]) for name, row in TABLE.items() for dtype in DTYPES}


HEADER = (
    "| variant | dtype | step: launches | peft's | bytes / peft's | merge cycle: launches | peft's | bytes / peft's |",
    "|---|---|---|---|---|---|---|---|",
)


def cells(ours: Count, peft: Count) -> list[str]:
    """Launches of a layer, peft's, and the ratio of bytes."""
    return [f"{ours.launches / LAYERS:g}", f"{peft.launches / LAYERS:g}", against(ours.bytes / peft.bytes)]


def markdown(found: dict[tuple[str, str], Counts]) -> str:
    lines = [
        [name, dtype, *cells(each.step, each.peft_step), *cells(each.cycle, each.peft_cycle)]
        for (name, dtype), each in found.items()
    ]
    return "\n".join([*HEADER, *(f"| {' | '.join(line)} |" for line in lines)])


def shown() -> str:
    """The table that README.md has."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    table = markdown(all_counts())
    README.write_text(report.between(README.read_text(), BEGIN, END, table))
    print(table)


if __name__ == "__main__":
    main()
