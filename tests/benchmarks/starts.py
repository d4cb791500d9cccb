"""Adapters that start from the weight: how long it takes to adapt one layer beside peft, and how near the start comes.

    python tests/benchmarks/run.py starts --sides 512 2048

The weights have singular values that fall as 1, 1/2, 1/3, ... to the power of 1/2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import against, table
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, inject

R = 16
INITS = ("pissa", "pissa_niter_4", "olora")
HEADER = "| start | weight | ours | peft | of peft | off the best | peft's |"


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


def start_rows(side: int, rounds: int) -> Iterator[list[str]]:
    """Yield a row for each start: seconds, and its relative distance from the exact start."""
    weight = make_weight(side)
    u, s, vh = torch.linalg.svd(weight.double())
    best = {"pissa": (u[:, :R] * s[:R]) @ vh[:R]}
    best["pissa_niter_4"] = best["pissa"]
    q, upper = torch.linalg.qr(weight.double())
    best["olora"] = q[:, :R] @ upper[:R]
    for init in INITS:
        found = [started(adapt, init, weight, rounds) for adapt in (with_ours, with_peft)]
        off = [float((product.double() - best[init]).norm() / best[init].norm()) for _, product in found]
        times = [seconds for seconds, _ in found]
        cells = [f"{1e3 * seconds:.1f} ms" for seconds in times] + [against(times[0] / times[1])]
        yield [init, f"{side} x {side}", *cells, *(f"{value:.0e}" for value in off)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=2, help="of each start")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table(HEADER, (row for side in options.sides for row in start_rows(side, options.rounds)))


if __name__ == "__main__":
    main()
