"""The tables of the benchmarks of single variants: a row for each subject and dtype, with ratios to peft."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from measure import interleaved, milliseconds, peak_bytes, ratio
from torch import nn

from lightning_lora import merge, unmerge

COMPARED = ("ours", "peft", "floor")
HEADER = "| model | dtype | step | of peft | of the floor | peak | of peft | merge cycle | of peft |"

# Of a subject, the width of its model, a dtype and seconds: the cells of the row, after subject and dtype.
Measure = Callable[[str, int, torch.dtype, float], list[str]]


def print_table(
    description: str | None,
    header: str,
    subjects: Iterable[str],
    measure: Measure,
    arguments: list[str] | None = None,
) -> None:
    """Print a table in Markdown, row by row as they are measured; the options come from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(header)
    print("|" + "---|" * (header.count("|") - 1))
    for subject in subjects:
        for dtype in (torch.float32, torch.bfloat16):
            cells = [subject, str(dtype).removeprefix("torch.")]
            cells += measure(subject, options.width, dtype, options.seconds)
            print("| " + " | ".join(cells) + " |", flush=True)


def step_and_cycle(models: dict[str, nn.Module], step: Callable[[nn.Module], object], seconds: float) -> list[str]:
    """Return cells for HEADER; models by the names of COMPARED. Medians of the rounds' ratios, and ratios of peaks."""

    def ours() -> None:
        merge(models["ours"])
        unmerge(models["ours"])

    def theirs() -> None:
        models["peft"].merge_adapter()  # type: ignore[operator]
        models["peft"].unmerge_adapter()  # type: ignore[operator]

    steps = {name: lambda model=model: step(model) for name, model in models.items()}
    times = interleaved(steps, seconds, "cpu")
    cycles = interleaved({"ours": ours, "peft": theirs}, seconds / 2, "cpu")
    peaks = {name: peak_bytes(function, "cpu") for name, function in steps.items()}
    return [
        f"{milliseconds(times, 'ours'):.0f} ms",
        f"{ratio(times, ['ours'], ['peft']):.2f}",
        f"{ratio(times, ['ours'], ['floor']):.2f}",
        f"{peaks['ours'] / 2**20:.1f} MiB",
        f"{peaks['ours'] / peaks['peft']:.2f}",
        f"{milliseconds(cycles, 'ours'):.0f} ms",
        f"{ratio(cycles, ['ours'], ['peft']):.2f}",
    ]
