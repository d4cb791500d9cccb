"""Adapters that start from the weight: how long the start takes beside peft's, and what a training step costs.

    python tests/benchmarks/starts.py --sides 512 1024 2048 --width 512 --seconds 10

The weights of the first table have singular values that fall as 1, 1/2, 1/3, ... to the power of 1/2. In the second,
`LoRA` is the same model with an adapter that starts as zero.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import interleaved, milliseconds, peak_bytes, ratio
from peft import LoraConfig, get_peft_model
from stack import stack, step
from torch import nn

from lightning_lora import LoRAConfig, inject

R = 16
INITS = ("pissa", "pissa_niter_4", "olora")
START_HEADER = "| start | weight | ours | peft | of peft | off the best | peft's |"
STEP_HEADER = "| model | dtype | rows | step | of peft's | of our LoRA | peft's of peft's LoRA | peak | of peft's |"


def make_weight(side: int) -> torch.Tensor:
    """A few large singular values, then a slow fall."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, side, generator=draw))[0] for _ in range(2))
    return (u / torch.arange(1, side + 1) ** 0.5) @ v


def with_ours(model: nn.Module, init: Any, targets: Any = "all-linear") -> nn.Module:
    inject(model, LoRAConfig(r=R, lora_alpha=R, target_modules=targets, init_lora_weights=init))
    return model


def with_peft(model: nn.Module, init: Any, targets: Any = "all-linear") -> nn.Module:
    config = LoraConfig(r=R, lora_alpha=R, target_modules=targets, init_lora_weights=init)
    return get_peft_model(model, config).base_model.model  # type: ignore[arg-type]


def started(
    adapt: Callable[..., nn.Module], init: str, weight: torch.Tensor, rounds: int
) -> tuple[float, torch.Tensor]:
    """Seconds of adapting one layer with this weight, the least of some rounds, and s * B0 @ A0."""
    seconds = []
    for _ in range(rounds):
        model = nn.Sequential(nn.Linear(*weight.shape, bias=False))
        model[0].weight = nn.Parameter(weight.clone())
        began = time.perf_counter()
        layer: Any = adapt(model, init, ["0"])[0]  # type: ignore[index]
        seconds.append(time.perf_counter() - began)
    a, b = layer.lora_A, layer.lora_B
    if isinstance(a, nn.ModuleDict):
        a, b = a["default"].weight, b["default"].weight
    return min(seconds), (b @ a).detach()


def start_rows(side: int, rounds: int) -> list[list[str]]:
    """The cells of a row for each start: seconds, and the distance from what it should be, over that one's norm."""
    weight = make_weight(side)
    u, s, vh = torch.linalg.svd(weight.double())
    best = {"pissa": (u[:, :R] * s[:R]) @ vh[:R]}
    best["pissa_niter_4"] = best["pissa"]
    q, upper = torch.linalg.qr(weight.double())
    best["olora"] = q[:, :R] @ upper[:R]
    rows = []
    for init in INITS:
        found = [started(adapt, init, weight, rounds) for adapt in (with_ours, with_peft)]
        off = [float((product.double() - best[init]).norm() / best[init].norm()) for _, product in found]
        times = [seconds for seconds, _ in found]
        cells = [f"{1e3 * seconds:.1f} ms" for seconds in times] + [f"{times[0] / times[1]:.2f}"]
        rows.append([init, f"{side} x {side}", *cells, *(f"{value:.0e}" for value in off)])
    return rows


def step_row(width: int, dtype: torch.dtype, rows: int, seconds: float) -> list[str]:
    """The cells of one row: medians of the rounds' ratios, and ratios of peaks."""
    base = stack(width, dtype, "cpu")
    models = {
        "ours": with_ours(copy.deepcopy(base), "pissa_niter_4"),
        "peft": with_peft(copy.deepcopy(base), "pissa_niter_4"),
        "ours, LoRA": with_ours(copy.deepcopy(base), True),
        "peft, LoRA": with_peft(copy.deepcopy(base), True),
    }
    x = torch.randn(1, rows, width).to(dtype)
    steps = {key: lambda model=model: step(model, x) for key, model in models.items()}
    times = interleaved(steps, seconds, "cpu")
    peaks = {key: peak_bytes(steps[key], "cpu") for key in ("ours", "peft")}
    return [
        f"4 blocks of {width}",
        str(dtype).removeprefix("torch."),
        str(rows),
        f"{milliseconds(times, 'ours'):.1f} ms",
        f"{ratio(times, ['ours'], ['peft']):.2f}",
        f"{ratio(times, ['ours'], ['ours, LoRA']):.2f}",
        f"{ratio(times, ['peft'], ['peft, LoRA']):.2f}",
        f"{peaks['ours'] / 2**20:.1f} MiB",
        f"{peaks['ours'] / peaks['peft']:.2f}",
    ]


def show(header: str, rows: Any) -> None:
    print(header)
    print("|" + "---|" * (header.count("|") - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3, help="of each start")
    parser.add_argument("--width", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row of steps")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    show(START_HEADER, (row for side in options.sides for row in start_rows(side, options.rounds)))
    print()
    cases = [(width, dtype, rows) for width in options.width for dtype in DTYPES for rows in options.rows]
    show(STEP_HEADER, (step_row(*case, options.seconds) for case in cases))


DTYPES = (torch.float32, torch.bfloat16)

if __name__ == "__main__":
    main()
