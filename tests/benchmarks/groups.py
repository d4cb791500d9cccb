"""The groups of measurements; each yields rows."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from measure import interleaved, milliseconds, peak_bytes, ratio
from stack import CANDIDATES, fill, lora_lib, narrow_peft, ours, peft_model, stack, step
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, merge, merged, save_adapter, unmerge


@dataclass
class Row:
    """`figure` of `what` at some size, as: / peft, training step fp32, d=128; "ours" has a unit, others are ratios."""

    what: str
    at: str
    figure: str
    value: float
    unit: str = ""


@dataclass
class Options:
    device: str
    seconds: float  # for each timing
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    sides: tuple[int, ...]  # of the square weights that are merged
    layers: int  # of a model with many
    hooks: tuple[int, ...]  # numbers of layers


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def inputs(d: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 128, d, device=device, dtype=dtype)


def a_training_step(options: Options) -> Iterator[Row]:
    for dtype, d, dropout in product(options.dtypes, options.widths, (0.0, 0.05)):
        x = inputs(d, dtype, options.device)
        makers = CANDIDATES if dtype == torch.float32 else {**CANDIDATES, "narrow peft": narrow_peft}
        models = {name: make(stack(d, dtype, options.device), dropout) for name, make in makers.items()}
        calls = {name: lambda model=model, x=x: step(model.train(), x) for name, model in models.items()}
        times = interleaved(calls, options.seconds, options.device)
        what = f"training step {name_of(dtype)}{', dropout 0.05' * bool(dropout)}"
        row = partial(Row, what, f"d={d}")
        yield row("ours", milliseconds(times, "ours"), "ms")
        for other in ("peft", "loralib", "floor"):
            yield row(f"/ {other}", ratio(times, ["ours"], [other]))
        if "narrow peft" in times and not dropout:
            yield Row(f"{what}, peft with bf16 factors", f"d={d}", "/ peft", ratio(times, ["ours"], ["narrow peft"]))


def b_forward(options: Options) -> Iterator[Row]:
    for dtype in options.dtypes:
        for d in options.widths:
            x = inputs(d, dtype, options.device)
            base, adapted, live = (stack(d, dtype, options.device).eval() for _ in range(3))
            ours(adapted)
            ours(live)
            fill(live)
            with quiet_fidelity():
                merge(live)
            calls = {name: lambda m=m: m(x) for name, m in (("base", base), ("unmerged", adapted), ("merged", live))}
            with torch.no_grad():
                times = interleaved(calls, options.seconds, options.device)
            for state in ("unmerged", "merged"):
                what = f"{state} forward {name_of(dtype)}"
                yield Row(what, f"d={d}", "/ untouched base", ratio(times, [state], ["base"]))


def c_merge(options: Options) -> Iterator[Row]:
    for dtype in options.dtypes:
        for d in options.sides:
            makers = [partial(make, targets=["0"]) for make in (ours, peft_model, lora_lib)]
            models = [make(_one_layer(d, dtype, options.device)) for make in makers]
            row = partial(Row, f"merge and unmerge {name_of(dtype)}, one layer", f"d={d}")
            yield from _merge_rows(row, models, options)
        for d in options.widths[:-1]:
            models = [make(stack(d, dtype, options.device)) for make in (ours, peft_model, lora_lib)]
            row = partial(Row, f"merge and unmerge {name_of(dtype)}, 24 layers", f"d={d}")
            yield from _merge_rows(row, models, options)


def _merge_rows(row: Callable[..., Row], models: list[Any], options: Options) -> Iterator[Row]:
    """A cycle of merging and unmerging by us, peft and loralib."""
    for model in models:
        fill(model)
    mine, theirs, lib = models
    calls = {
        "ours": lambda: (merge(mine), unmerge(mine)),
        "peft": lambda: (theirs.merge_adapter(), theirs.unmerge_adapter()),
        "loralib": lambda: (lib.eval(), lib.train()),
    }
    with quiet_fidelity():
        times = interleaved(calls, options.seconds, options.device)
    yield row("ours", milliseconds(times, "ours"), "ms")
    for other in ("peft", "loralib"):
        yield row(f"/ {other}", ratio(times, ["ours"], [other]))


def _one_layer(d: int, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, d, bias=False)).to(device, dtype)


def d_memory(options: Options) -> Iterator[Row]:
    d = options.widths[-1]
    for dtype in options.dtypes:
        for dropout in (0.0, 0.05):
            x = inputs(d, dtype, options.device)
            models = {n: make(stack(d, dtype, options.device), dropout).train() for n, make in CANDIDATES.items()}
            peaks = {n: peak_bytes(lambda m=m: step(m, x), options.device) for n, m in models.items()}
            row = partial(
                Row, f"peak memory of a training step {name_of(dtype)}{', dropout 0.05' * bool(dropout)}", f"d={d}"
            )
            yield row("ours", peaks["ours"] / 2**20, "MiB")
            for other in ("peft", "loralib", "floor"):
                yield row(f"/ {other}", peaks["ours"] / peaks[other])
    yield from _merging_memory(options)


def _merging_memory(options: Options) -> Iterator[Row]:
    """The first merge of a model: later ones use its copy of the weight again."""
    d = options.sides[-1]
    for dtype in options.dtypes:
        other, model = (ours(_one_layer(d, dtype, options.device), targets=["0"]) for _ in range(2))
        for each in (other, model):
            fill(each)
        weight = model[0].weight.nbytes

        def cycle(model: nn.Module = model) -> None:
            with merged(model):
                pass

        with quiet_fidelity():
            peak = peak_bytes(cycle, options.device, partial(cycle, other))
        yield Row(f"peak memory of merging {name_of(dtype)}", f"d={d}", "/ the weight", peak / weight)


def e_many_layers(options: Options) -> Iterator[Row]:
    model = _many_layers(options.layers, 256, options.device)
    # 64 wide, so that all are merged in one way: plain copies of larger ones would exceed their 64 MB
    small = _many_layers(options.layers, 64, options.device)
    inject(small, LoRAConfig(r=8))
    with tempfile.TemporaryDirectory() as folder:
        calls: list[tuple[str, int, Callable[[], Any], int]] = [
            ("inject", 256, lambda: inject(model, LoRAConfig(r=8)), 1),
            ("save_adapter", 256, lambda: save_adapter(model, folder), 3),
            ("load_adapter", 256, lambda: load_adapter(model, folder), 3),
            ("merge and unmerge", 64, lambda: (merge(small), unmerge(small)), 5),
        ]
        for what, width, call, times in calls:
            seconds = _best(call, times)
            yield Row(what, f"{options.layers} layers of {width}", "ours", 1e3 * seconds, "ms")
    yield Row("import, beyond Lightning's", "", "ours", _import_ms(), "ms")


def _many_layers(count: int, width: int, device: str) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)]).to(device)


def _best(call: Callable[[], Any], times: int) -> float:
    """The least of so many runs, in seconds: the others were held up."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _import_ms() -> float:
    """Processor time, which other work does not disturb."""
    code = (
        "import time, lightning.pytorch; t = time.process_time(); from lightning_lora import LoRACallback; "
        "print(time.process_time() - t)"
    )
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    _, *runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=kept).stdout for _ in range(6)]
    return 1e3 * statistics.median(map(float, runs))  # the first run compiled the files


@contextlib.contextmanager
def quiet_fidelity() -> Iterator[None]:
    """The first merge into 16 bits reports what rounding costs; that is not measured here."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lightning_lora: merged 16-bit weights")
        yield
