"""The groups of measurements; each yields rows (group, what, value, unit, target or None)."""

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
from pathlib import Path
from typing import Any

import torch
from measure import (
    interleaved,
    milliseconds,
    overhead,
    peak_bytes,
    ratio,
    resident_bytes,
    saved_bytes,
)
from stack import CANDIDATES, fill, lora_lib, narrow_peft, ours, peft_model, stack, step
from torch import nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_adapter, merge, merged, save_adapter, unmerge
from lightning_lora.nn.adapted_weights import adapted_layers


@dataclass
class Row:
    """`figure` of `what` at some size, as: / peft, training step fp32, d=128."""

    group: str
    what: str
    at: str
    figure: str
    value: float
    unit: str = ""
    target: float | None = None  # at most

    @property
    def verdict(self) -> str:
        return "" if self.target is None else "reached" if self.value <= self.target else "not reached"


@dataclass
class Options:
    device: str
    seconds: float  # for each timing
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    layers: tuple[int, ...]
    sides: tuple[int, ...]  # of the square weights that are merged
    compiled: tuple[bool, ...]  # as group a runs
    hooks: dict[int, float | None]  # numbers of layers, each with the milliseconds wanted


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def inputs(d: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 128, d, device=device, dtype=dtype)


def a_training_step(options: Options) -> Iterator[Row]:
    for compiled, dtype, d, dropout in product(options.compiled, options.dtypes, options.widths, (0.0, 0.05)):
        x = inputs(d, dtype, options.device)
        makers = CANDIDATES if dtype == torch.float32 else {**CANDIDATES, "narrow peft": narrow_peft}
        models = {name: make(stack(d, dtype, options.device), dropout) for name, make in makers.items()}
        if compiled:
            models = {name: torch.compile(model) for name, model in models.items()}
        calls = {name: lambda model=model, x=x: step(model.train(), x) for name, model in models.items()}
        times = interleaved(calls, options.seconds, options.device)
        what = f"training step{' compiled' * compiled} {name_of(dtype)}{', dropout 0.05' * bool(dropout)}"
        row = partial(Row, "a", what, f"d={d}")
        yield row("ours", milliseconds(times, "ours"), "ms")
        yield row("/ peft", ratio(times, ["ours"], ["peft"]), "", 1.0)
        if "narrow peft" in times:
            yield row("/ peft with bf16 adapters", ratio(times, ["ours"], ["narrow peft"]))
        yield row("/ loralib", ratio(times, ["ours"], ["loralib"]), "", 1.0)
        yield row("/ floor", ratio(times, ["ours"], ["floor"]))
        yield row("overhead / peft's", overhead(times, "ours", "peft", "floor"), "", 0.75)


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
            for state, target in (("unmerged", None), ("merged", 1.01 if d >= 512 else None)):
                what = f"{state} forward {name_of(dtype)}"
                yield Row("b", what, f"d={d}", "/ untouched base", ratio(times, [state], ["base"]), "", target)


def c_merge(options: Options) -> Iterator[Row]:
    goals = {torch.float32: (0.5, 0.5), torch.bfloat16: (0.4, 1.0)}
    for dtype in options.dtypes:
        for d in options.sides:
            peft_goal, loralib_goal = goals[dtype] if d >= 4096 else (1.0, None)
            makers = [partial(make, targets=["0"]) for make in (ours, peft_model, lora_lib)]
            models = [make(_one_layer(d, dtype, options.device)) for make in makers]
            row = partial(Row, "c", f"merge and unmerge {name_of(dtype)}, one layer", f"d={d}")
            yield from _merge_rows(row, models, options, (peft_goal, loralib_goal))
        for d in options.widths[:-1]:
            models = [make(stack(d, dtype, options.device)) for make in (ours, peft_model, lora_lib)]
            row = partial(Row, "c", f"merge and unmerge {name_of(dtype)}, 24 layers", f"d={d}")
            yield from _merge_rows(row, models, options, (1.0, None))


def _merge_rows(
    row: Callable[..., Row], models: list[Any], options: Options, goals: tuple[float, float | None]
) -> Iterator[Row]:
    """A cycle of merging and unmerging by us, peft and loralib, and one copy of the weights."""
    for model in models:
        fill(model)
    mine, theirs, lib = models
    weights = [layer.weight.detach() for layer in adapted_layers(mine).values()]
    copies = [torch.empty_like(weight) for weight in weights]
    calls = {
        "ours": lambda: (merge(mine), unmerge(mine)),
        "peft": lambda: (theirs.merge_adapter(), theirs.unmerge_adapter()),
        "loralib": lambda: (lib.eval(), lib.train()),
        "copy": lambda: [copy.copy_(weight) for copy, weight in zip(copies, weights, strict=True)],
    }
    with quiet_fidelity():
        times = interleaved(calls, options.seconds, options.device)
    yield row("ours", milliseconds(times, "ours"), "ms")
    yield row("/ one copy of the weights", ratio(times, ["ours"], ["copy"]))
    for name, goal in zip(("peft", "loralib"), goals, strict=True):
        yield row(f"/ {name}", ratio(times, ["ours"], [name]), "", goal)


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
            saved = {n: saved_bytes(m, x) for n, m in models.items()}
            resident = {n: 0 if dropout else resident_bytes(n, d, dtype, dropout) for n in ("ours", "peft")}
            dropping = ", dropout 0.05" * bool(dropout)
            row = partial(Row, "d", f"peak memory of a training step {name_of(dtype)}{dropping}", f"d={d}")
            yield row("ours", peaks["ours"] / 2**20, "MiB")
            yield row("/ peft", peaks["ours"] / peaks["peft"], "", 0.9)
            yield row("/ loralib", peaks["ours"] / peaks["loralib"])
            yield row("/ floor", peaks["ours"] / peaks["floor"])
            yield row("saved for backward / peft's", saved["ours"] / saved["peft"])
            if resident["peft"]:
                yield row("resident / peft's", resident["ours"] / resident["peft"])
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
        yield Row("d", f"peak memory of merging {name_of(dtype)}", f"d={d}", "/ the weight", peak / weight)


def e_many_layers(options: Options) -> Iterator[Row]:
    costs: dict[str, list[float]] = {}
    for count in options.layers:
        model = _many_layers(count, 256, options.device)
        with tempfile.TemporaryDirectory() as folder:
            for what, call in {
                "inject": lambda m=model: inject(m, LoRAConfig(r=8)),
                "adapter_state_dict": lambda m=model: adapter_state_dict(m),
                "save_adapter": lambda m=model, f=folder: save_adapter(m, f),
                "load_adapter": lambda m=model, f=folder: load_adapter(m, f),
            }.items():
                costs.setdefault(what, []).append(_best(call, 1 if what == "inject" else 3))
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            raw = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        if count == 1000 or count == options.layers[-1]:
            yield Row("e", "adapter folder", f"{count} layers", "/ its tensors' bytes", size / raw, "", 1.02)
        # 64 wide, so that all are merged in one way: plain copies of larger ones would exceed their 64 MB
        small = _many_layers(count, 64, options.device)
        inject(small, LoRAConfig(r=8))
        costs.setdefault("merge and unmerge", []).append(_best(lambda m=small: (merge(m), unmerge(m)), 5))
    for what, seconds in costs.items():
        at = options.layers.index(1000) if 1000 in options.layers else -1
        target = 500 if what == "inject" else None
        yield Row("e", what, f"{options.layers[at]} layers", "ours", 1e3 * seconds[at], "ms", target)
        sizes = "/".join(map(str, options.layers))
        yield Row("e", what, f"{sizes} layers", "grows with the power", _power(options.layers, seconds))
    yield Row("e", "import", "", "over lightning's", _import_ms(), "ms", 50)


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


def _power(counts: tuple[int, ...], seconds: list[float]) -> float:
    """Slope of log(time) over log(layers), by least squares: 1 is linear."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(seconds).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


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
