"""What a GPU is asked to do in a step and in a merge cycle: counted on a pretended device, beside peft.

    python tests/benchmarks/run.py launches            # print the table and write it into README.md beside this file
    python tests/benchmarks/run.py launches --time     # on a GPU: milliseconds by CUDA events instead

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
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import report
from lightning_lora import LoRAConfig, inject, merge, unmerge

sys.path.append(str(Path(__file__).parents[1]))
from support.devices import Count, count
from support.pretend_device import pretend_device
from support.variants import define_gated, variants_forgotten

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


class Fused(nn.Module):
    """A projection to queries, keys and values, of which the next layer takes the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)[:, :WIDTH]  # type: ignore[no-any-return]


def chain(layer: Build) -> Callable[[int], nn.Module]:
    return lambda layers: nn.Sequential(*(layer() for _ in range(layers)))


LINEAR = chain(lambda: nn.Linear(WIDTH, WIDTH))


def convolutions(channels_last: bool = False, **options: Any) -> Callable[[int], nn.Module]:
    order: Any = torch.channels_last if channels_last else torch.preserve_format
    return chain(lambda: nn.Conv2d(32, 32, 3, padding=1, **options).to(memory_format=order))


def features() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH)


def images() -> torch.Tensor:
    return torch.randn(4, 32, 8, 8)


def images_with_channels_last() -> torch.Tensor:
    return images().to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        options: of LoRAConfig.
        peft: makes peft's config for these layers; None where peft has no such thing.
        network: makes the network with this number of layers.
        x: makes an input of it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    peft: Callable[..., Any] | None = LoraConfig
    network: Callable[[int], nn.Module] = LINEAR
    x: Callable[[], torch.Tensor] = features


KINDS = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
TABLE = {
    "LoRA": Row(),
    "LoRA, dropout": Row({"lora_dropout": 0.1}, partial(LoraConfig, lora_dropout=0.1)),
    "DoRA": Row({"use_dora": True}, partial(LoraConfig, use_dora=True)),
    "PiSSA (peft: plain)": Row({"init_lora_weights": "pissa"}),
    "LoHa": Row({"variant": "loha"}, LoHaConfig),
    "a variant of your own": Row({"variant": "gated"}, None),
    "LoRA, Conv1D": Row(network=chain(lambda: Conv1D(WIDTH, WIDTH)), peft=partial(LoraConfig, fan_in_fan_out=True)),
    "LoRA, Conv2d": Row(network=convolutions(), x=images),
    "LoRA, Conv2d, channels last": Row(network=convolutions(channels_last=True), x=images_with_channels_last),
    "LoRA, Conv2d, groups": Row(network=convolutions(groups=4), x=images, peft=None),  # peft cannot merge it
    "LoRA, Embedding": Row(network=Tables, x=lambda: torch.arange(ROWS)),
    "LoRA, Embedding, padding": Row(network=partial(Tables, padding_idx=0), x=lambda: torch.arange(ROWS)),
    "LoRA, fused projection": Row(network=chain(Fused), peft=None),
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
        fused = {name: [True, False, True] for name in names if name.endswith("qkv")}
        inject(model, LoRAConfig(r=RANK, target_modules=names, enable_lora=fused or None, **row.options))
    elif row.peft is not None:
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
    peft_step: Count | None = None
    peft_cycle: Count | None = None


def counted(work: Callable[[], None]) -> Count:
    work()  # the first one makes what is kept
    return count(work)


def counts(row: Row, dtype: torch.dtype, layers: int = LAYERS) -> Counts:
    """Count for one line, on the pretended device."""
    with pretend_device() as device, variants_forgotten():
        define_gated()
        torch.manual_seed(0)
        x = row.x().to(device)
        x = x.to(dtype) if x.is_floating_point() else x

        def base() -> nn.Module:
            return row.network(layers).to(dtype).to(device)

        frozen = base().requires_grad_(False)
        floor = counted(lambda: step(frozen, x, to_input=True))
        ours = adapted(row, base, ours=True)
        found = [counted(lambda: step(ours, x)) - floor, counted(lambda: cycle(ours, ours=True))]
        if row.peft is not None:
            theirs = adapted(row, base, ours=False)
            found += [counted(lambda: step(theirs, x)) - floor, counted(lambda: cycle(theirs, ours=False))]
    return Counts(*found)


def all_counts() -> dict[tuple[str, str], Counts]:
    return {(name, dtype): counts(row, DTYPES[dtype]) for name, row in TABLE.items() for dtype in DTYPES}


HEADER = (
    "| variant | dtype | step: launches | peft's | bytes / peft's | float64 | waits "
    "| merge cycle: launches | peft's | bytes / peft's | float64 | waits, all layers |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def cells(ours: Count, peft: Count | None) -> list[str]:
    """Launches of a layer, peft's, the ratio of bytes, float64 operators of a layer, and waits of all layers."""
    theirs = ["", ""] if peft is None else [f"{peft.launches / LAYERS:g}", f"{ours.bytes / peft.bytes:.2f}"]
    return [f"{ours.launches / LAYERS:g}", *theirs, f"{ours.float64 / LAYERS:g}", f"{ours.waits}"]


def markdown(found: dict[tuple[str, str], Counts]) -> str:
    lines = [
        [name, dtype, *cells(each.step, each.peft_step), *cells(each.cycle, each.peft_cycle)]
        for (name, dtype), each in found.items()
    ]
    return "\n".join([*HEADER, *(f"| {' | '.join(line)} |" for line in lines)])


def shown() -> str:
    """The table that README.md has."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip()


def write(table: str) -> None:
    README.write_text(report.between(README.read_text(), BEGIN, END, table))


# --- on a GPU ---


def milliseconds(work: Callable[[], None], repeats: int = 50) -> float:
    """The median of one run of `work` by CUDA events, which do not count what the host does meanwhile."""
    times = []
    for _ in range(10 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[10:])[repeats // 2]


def print_times() -> None:
    """Milliseconds of a step and of a merge cycle; not run on a GPU yet."""
    print("| variant | dtype | floor | step | peft's | merge cycle | peft's |\n|---|---|---|---|---|---|---|")
    with variants_forgotten():
        define_gated()
        for name, row in TABLE.items():
            for dtype_name, dtype in DTYPES.items():
                print(f"| {name} | {dtype_name} | {' | '.join(times(row, dtype))} |", flush=True)


def times(row: Row, dtype: torch.dtype) -> list[str]:
    torch.manual_seed(0)
    x = row.x().cuda()
    x = x.to(dtype) if x.is_floating_point() else x

    def base() -> nn.Module:
        return row.network(LAYERS).to(dtype).cuda()

    frozen = base().requires_grad_(False)
    ours, theirs = adapted(row, base, ours=True), adapted(row, base, ours=False) if row.peft else None
    works: list[Callable[[], None] | None] = [
        lambda: step(frozen, x, to_input=True),
        lambda: step(ours, x),
        None if theirs is None else lambda: step(theirs, x),
        lambda: cycle(ours, ours=True),
        None if theirs is None else lambda: cycle(theirs, ours=False),
    ]
    return ["" if work is None else f"{milliseconds(work):.3f}" for work in works]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="milliseconds by CUDA events, on a GPU")
    if parser.parse_args(arguments).time:
        print_times()
        return
    table = markdown(all_counts())
    write(table)
    print(table)


if __name__ == "__main__":
    main()
