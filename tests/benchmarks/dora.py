"""DoRA: training steps, merge cycles and peak memory against peft's use_dora on the same stack of layers.

    python tests/benchmarks/run.py dora --seconds 8

`LoRA` is our plain LoRA on the same layers, and `floor` the frozen stack.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from measure import interleaved, milliseconds, peak_bytes, ratio
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, inject, merge, unmerge

LAYERS = 4


def stack(width: int) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.Tanh())))


def adapted(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The same base four times: with our DoRA, peft's, our plain LoRA, and frozen."""
    torch.manual_seed(0)
    base = stack(width).to(dtype).train().requires_grad_(False)
    ours, theirs, plain = (copy.deepcopy(base) for _ in range(3))
    targets = [str(i) for i in range(0, 2 * LAYERS, 2)]
    inject(ours, LoRAConfig(r=16, target_modules=targets, use_dora=True))
    inject(plain, LoRAConfig(r=16, target_modules=targets))
    config = LoraConfig(r=16, target_modules=targets, use_dora=True)
    models: dict[str, Any] = {"ours": ours, "peft": get_peft_model(theirs, config), "LoRA": plain, "floor": base}  # type: ignore[arg-type]
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn_like(parameter))
    return models


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None


def measured(width: int, tokens: int, dtype: torch.dtype, seconds: float) -> list[str]:
    """The cells of one row: medians of the rounds' ratios, and ratios of peaks."""
    models = adapted(width, dtype)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()

    def ours(name: str) -> None:
        merge(models[name])
        unmerge(models[name])

    def theirs() -> None:
        models["peft"].merge_adapter()
        models["peft"].unmerge_adapter()

    steps = {key: lambda model=model: step(model, x) for key, model in models.items()}
    times = interleaved(steps, seconds, "cpu")
    cycles = {"ours": lambda: ours("ours"), "LoRA": lambda: ours("LoRA"), "peft": theirs}
    merges = interleaved(cycles, seconds / 2, "cpu")
    peaks = {key: peak_bytes(function, "cpu") for key, function in steps.items()}
    return [
        f"{width}",
        str(dtype).removeprefix("torch."),
        f"{milliseconds(times, 'ours'):.1f} ms",
        f"{ratio(times, ['ours'], ['peft']):.2f}",
        f"{ratio(times, ['ours'], ['LoRA']):.2f}",
        f"{ratio(times, ['ours'], ['floor']):.2f}",
        f"{peaks['ours'] / 2**20:.1f} MiB",
        f"{peaks['ours'] / peaks['peft']:.2f}",
        f"{milliseconds(merges, 'ours'):.1f} ms",
        f"{ratio(merges, ['ours'], ['peft']):.2f}",
        f"{ratio(merges, ['ours'], ['LoRA']):.2f}",
    ]


HEADER = (
    "| d | dtype | step | of peft | of LoRA | of the floor | peak | of peft | merge cycle | of peft | of LoRA |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("\n".join(HEADER))
    for width in options.widths:
        for dtype in (torch.float32, torch.bfloat16):
            print("| " + " | ".join(measured(width, options.tokens, dtype, options.seconds)) + " |", flush=True)


if __name__ == "__main__":
    main()
