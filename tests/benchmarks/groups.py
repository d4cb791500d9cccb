"""The groups of measurements; each yields rows (group, what, value, unit, target or None)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from stack import CANDIDATES, fill, lora_lib, ours, peft, stack, step
from torch import nn

from lightning_lora import adapter_state_dict, inject, is_merged, load_adapter, merge, merged, save_adapter, unmerge
from lightning_lora.config import LoRAConfig


@dataclass
class Row:
    group: str
    what: str
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
    compile: bool


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def inputs(d: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 128, d, device=device, dtype=dtype)


def a_training_step(options: Options) -> Iterator[Row]:
    for dtype in options.dtypes:
        for d in options.widths:
            for dropout in (0.0, 0.05):
                x = inputs(d, dtype, options.device)
                models = {name: make(stack(d, dtype, options.device), dropout) for name, make in CANDIDATES.items()}
                if options.compile:
                    models = {name: torch.compile(model) for name, model in models.items()}
                calls = {name: lambda model=model: step(model.train(), x) for name, model in models.items()}
                times = interleaved(calls, options.seconds, options.device)
                at = f"step {name_of(dtype)} d={d} dropout={dropout}"
                yield Row("a", f"{at}: ours", milliseconds(times, "ours"), "ms")
                yield Row("a", f"{at}: / peft", ratio(times, ["ours"], ["peft"]), "", 1.0)
                yield Row("a", f"{at}: / loralib", ratio(times, ["ours"], ["loralib"]), "", 1.0)
                yield Row("a", f"{at}: / floor", ratio(times, ["ours"], ["floor"]))
                over = overhead(times, "ours", "peft", "floor")
                yield Row("a", f"{at}: overhead / peft's", over, "", 0.75)


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
            at = f"forward {name_of(dtype)} d={d}"
            yield Row("b", f"{at}: unmerged / base", ratio(times, ["unmerged"], ["base"]))
            target = 1.01 if d >= 512 else None
            yield Row("b", f"{at}: merged / base", ratio(times, ["merged"], ["base"]), "", target)


def c_merge(options: Options) -> Iterator[Row]:
    goals = {torch.float32: (0.5, 0.5), torch.bfloat16: (0.4, 1.0)}
    for dtype in options.dtypes:
        for d in options.sides:
            mine, theirs, lib = (_one_layer(d, dtype, options.device, make) for make in (ours, peft, lora_lib))
            weight = mine[0].weight.detach()
            other = torch.empty_like(weight)
            lib.train()
            calls = {
                "merge": lambda: merge(mine),
                "unmerge": lambda: unmerge(mine),
                "peft merge": lambda: theirs[0].merge(),
                "peft unmerge": lambda: theirs[0].unmerge(),
                "loralib merge": lambda: lib.eval(),
                "loralib unmerge": lambda: lib.train(),
                "copy": lambda: other.copy_(weight),
            }
            with quiet_fidelity():
                times = interleaved(calls, options.seconds, options.device)
            at = f"merge and unmerge {name_of(dtype)} {d} x {d}"
            cycle = ["merge", "unmerge"]
            peft_goal, loralib_goal = goals[dtype] if d >= 4096 else (1.0, None)
            yield Row("c", f"{at}: ours", milliseconds(times, *cycle), "ms")
            yield Row("c", f"{at}: / copy", ratio(times, cycle, ["copy"]))
            yield Row("c", f"{at}: / peft", ratio(times, cycle, ["peft merge", "peft unmerge"]), "", peft_goal)
            lib_ratio = ratio(times, cycle, ["loralib merge", "loralib unmerge"])
            yield Row("c", f"{at}: / loralib", lib_ratio, "", loralib_goal)


def _one_layer(d: int, dtype: torch.dtype, device: str, make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, d, bias=False)).to(device, dtype)
    model = make(model, targets=["0"])
    fill(model)
    return model


def d_memory(options: Options) -> Iterator[Row]:
    d = options.widths[-1]
    for dtype in options.dtypes:
        for dropout in (0.0, 0.05):
            x = inputs(d, dtype, options.device)
            models = {n: make(stack(d, dtype, options.device), dropout).train() for n, make in CANDIDATES.items()}
            peaks = {n: peak_bytes(lambda m=m: step(m, x), options.device) for n, m in models.items()}
            saved = {n: saved_bytes(m, x) for n, m in models.items()}
            resident = {n: resident_bytes(lambda m=m: step(m, x)) for n, m in models.items()}
            at = f"step {name_of(dtype)} d={d} dropout={dropout}"
            yield Row("d", f"{at}: peak allocated", peaks["ours"] / 2**20, "MiB")
            yield Row("d", f"{at}: peak allocated / peft", peaks["ours"] / peaks["peft"], "", 0.9)
            yield Row("d", f"{at}: peak allocated / floor", peaks["ours"] / peaks["floor"])
            yield Row("d", f"{at}: saved for backward / peft", saved["ours"] / saved["peft"])
            if resident["peft"]:
                yield Row("d", f"{at}: peak resident / peft", resident["ours"] / resident["peft"])
    yield from _merging_memory(options)


def _merging_memory(options: Options) -> Iterator[Row]:
    d = options.sides[-1]
    for dtype in options.dtypes:
        model = _one_layer(d, dtype, options.device, ours)
        weight = model[0].weight.nbytes

        def cycle(model: nn.Module = model) -> None:
            with merged(model):
                pass

        with quiet_fidelity():
            yield Row(
                "d", f"merging {name_of(dtype)} {d} x {d}: peak / weight", peak_bytes(cycle, options.device) / weight
            )


def e_many_layers(options: Options) -> Iterator[Row]:
    costs: dict[str, list[float]] = {}
    for count in options.layers:
        model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(count)]).to(options.device)
        with tempfile.TemporaryDirectory() as folder:
            for what, call in {
                "inject": lambda m=model: inject(m, LoRAConfig(r=8)),
                "adapter_state_dict": lambda m=model: adapter_state_dict(m),
                "save_adapter": lambda m=model, f=folder: save_adapter(m, f),
                "load_adapter": lambda m=model, f=folder: load_adapter(m, f),
                "merge": lambda m=model: merge(m),
                "is_merged": lambda m=model: is_merged(m),
                "unmerge": lambda m=model: unmerge(m),
            }.items():
                began = time.perf_counter()
                call()
                costs.setdefault(what, []).append(time.perf_counter() - began)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            raw = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        if count == 1000 or count == options.layers[-1]:
            yield Row("e", f"adapter folder / tensor bytes, {count} layers", size / raw, "", 1.02)
    for what, seconds in costs.items():
        at = options.layers.index(1000) if 1000 in options.layers else -1
        yield Row(
            "e", f"{what}, {options.layers[at]} layers", 1e3 * seconds[at], "ms", 500 if what == "inject" else None
        )
        yield Row("e", f"{what}: time grows with layers to the power", _power(options.layers, seconds))
    yield Row("e", "import over lightning's", _import_ms(), "ms", 50)


def _power(counts: tuple[int, ...], seconds: list[float]) -> float:
    """Slope of log(time) over log(layers), by least squares: 1 is linear."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(seconds).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def _import_ms() -> float:
    code = (
        "import time, lightning.pytorch; t = time.perf_counter(); import lightning_lora; print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return 1e3 * sorted(float(run.stdout) for run in runs)[2]


@contextlib.contextmanager
def quiet_fidelity() -> Iterator[None]:
    """The first merge into 16 bits reports what rounding costs; that is not measured here."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lightning_lora: merged 16-bit weights")
        yield
