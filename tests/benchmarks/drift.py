"""What becomes of a frozen weight that is merged and unmerged many times: python tests/benchmarks/run.py drift

One nn.Linear without a bias, W of std 0.02, and s * B @ A of 1 % of W's norm. All packages get the same factors. Either
they stay as they are, or they change before each cycle, as between the validations of a training: a tenth of their norm
is new. Nothing but the merging and unmerging touches W.

This package would keep a plain copy of so small a weight. Here it does not, so that it unmerges as in a large model.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import loralib
import torch
from groups import quiet_fidelity
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import report
from lightning_lora import LoRAConfig, inject, merge, unmerge
from lightning_lora.model import merging

WIDTH, R, ALPHA = 1024, 16, 32
STD, SIZE, NEW = 0.02, 0.01, 0.1  # of W; of s * B @ A, over W's norm; the share of A and B that a change replaces
CYCLES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SHOWN = (1, 10, 100, 1000)  # in the table
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADAPTERS = {"changes": True, "stays": False}
FIGURES = ("changed", "largest", "moved")
RESULTS, PLOT = report.HERE / "drift.json", report.HERE / "drift.png"
BEGIN, END = "<!-- drift: written by tests/benchmarks/drift.py -->\n", "<!-- end of drift -->"
HEADER = "| dtype | package | weights changed | largest change / mean of abs(W) | change of W / s·B·A |"
COLOURS = {"bf16": "#d1495b", "fp16": "#c77b0a", "fp32": "#8a63d2", "ours": "#1a8a5a"}
RAISED = {"fp32": 11, "ours": -2}  # the labels of lines near zero, by points


class Candidate:
    """One adapted layer: its frozen weight, its factors, and what merges and unmerges it."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, *cycle: Callable[[], object]) -> None:
        self.weight, self.a, self.b, self.cycle = weight, a, b, cycle

    def run(self, a: Tensor, b: Tensor) -> None:
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)
        for step in self.cycle:
            step()


def ours(base: nn.Module) -> Candidate:
    inject(base, LoRAConfig(r=R, lora_alpha=ALPHA))
    layer: Any = base[0]  # type: ignore[index]
    return Candidate(layer.weight, layer.lora_A, layer.lora_B, lambda: merge(base), lambda: unmerge(base))


def peft(base: nn.Module) -> Candidate:
    """As PEFT's users make it: float32 factors, safe_merge off."""
    model: Any = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]))  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    factors = (each["default"].weight for each in (layer.lora_A, layer.lora_B))
    return Candidate(layer.base_layer.weight, *factors, model.merge_adapter, model.unmerge_adapter)


def lora_lib(base: nn.Module) -> Candidate:
    """Its factors have the weight's dtype."""
    plain: Any = base[0]  # type: ignore[index]
    layer: Any = loralib.Linear(plain.in_features, plain.out_features, r=R, lora_alpha=ALPHA, bias=False)
    layer.to(plain.weight.dtype).weight.data.copy_(plain.weight)
    return Candidate(layer.weight, layer.lora_A, layer.lora_B, layer.eval, layer.train)


CANDIDATES: dict[str, Callable[[nn.Module], Candidate]] = {"ours": ours, "peft": peft, "loralib": lora_lib}


def factors(norm: float, width: int, changes: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A and B for each cycle, so that s * B @ A has SIZE of this norm."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(R, width, generator=draw), torch.randn(width, R, generator=draw)
    while True:
        both = (a.double() @ a.double().T * (b.double().T @ b.double())).sum().sqrt() * ALPHA / R
        share = float(SIZE * norm / both) ** 0.5
        yield a * share, b * share
        if changes:
            a, b = ((1 - NEW**2) ** 0.5 * each + NEW * torch.randn(each.shape, generator=draw) for each in (a, b))


@patch.object(merging, "COPY_BUDGET", 0)
def measured(width: int = WIDTH, cycles: tuple[int, ...] = CYCLES) -> dict[str, Any]:
    """Return the figures after these numbers of cycles, in a row for each adapter, dtype and package."""
    rows = []
    for (adapter, changes), (name, dtype) in itertools.product(ADAPTERS.items(), DTYPES.items()):
        torch.manual_seed(0)
        weight = (STD * torch.randn(width, width)).to(dtype)
        candidates = {package: make(_base(weight)) for package, make in CANDIDATES.items()}
        found: dict[str, list[dict[str, float]]] = {package: [] for package in candidates}
        norm = float(weight.double().norm())
        for cycle, (a, b) in zip(range(1, cycles[-1] + 1), factors(norm, width, changes), strict=False):
            for package, candidate in candidates.items():
                with quiet_fidelity():
                    candidate.run(a, b)
                if cycle in cycles:
                    found[package].append(change(candidate.weight.detach(), weight))
        for package, each in found.items():
            figures = {figure: [at[figure] for at in each] for figure in FIGURES}
            rows.append({"adapter": adapter, "dtype": name, "package": package, **figures})
    return {"cycles": [*cycles], "rows": rows}


def _base(weight: Tensor) -> nn.Module:
    layer = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


def change(weight: Tensor, before: Tensor) -> dict[str, float]:
    """Three shares: of the values whose bits changed; the largest change; the change's norm over that of s * B @ A."""
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    difference, before_double = weight.double() - before.double(), before.double()
    return {
        "changed": float((weight.view(bits) != before.view(bits)).double().mean()),
        "largest": float(difference.abs().max() / before_double.abs().mean()),
        "moved": float(difference.norm() / before_double.norm() / SIZE),
    }


def markdown(content: dict[str, Any]) -> str:
    """A table with the figures after SHOWN cycles in one cell, where the adapter changes."""
    places = [content["cycles"].index(count) for count in SHOWN]
    lines = []
    for row in _where_it_changes(content):
        cells = [row["dtype"], row["package"]]
        cells += [", ".join(f"{100 * row[figure][place]:.2g}" for place in places) + " %" for figure in FIGURES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{content['machine']}, {content['date']}:", "", HEADER, "|---|---|---|---|---|", *lines])


def _where_it_changes(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["adapter"] == "changes"]


def plot(content: dict[str, Any]) -> Any:
    """A figure with the norm of W's change over the number of cycles, where the adapter changes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = {(row["dtype"], row["package"]): row["moved"] for row in _where_it_changes(content)}
    cycles = content["cycles"]
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 3.5), dpi=report.DPI, layout="constrained")
        axes = figure.subplots()

        def label(line: str, text: str, at: float) -> None:
            place = (10, RAISED.get(line, 0))
            axes.annotate(text, (cycles[-1], at), place, textcoords="offset points", va="center", color=COLOURS[line])

        for (dtype, package), moved in rows.items():
            colour, dashes = COLOURS["ours" if package == "ours" else dtype], "--" if package == "loralib" else "-"
            axes.plot(cycles, moved, dashes, color=colour, lw=2, clip_on=False, zorder=4 if package == "ours" else 3)
        for dtype in DTYPES:
            peft_, loralib_ = (_percent(rows[dtype, package][-1]) for package in ("peft", "loralib"))
            both = f"PEFT {peft_}, loralib {loralib_}" if peft_ != loralib_ else f"PEFT, loralib {peft_}"
            label(dtype, f"{dtype}: {both}", rows[dtype, "peft"][-1])
        label("ours", f"lightning_lora: {_percent(max(rows[dtype, 'ours'][-1] for dtype in DTYPES))} in each", 0)
        axes.set(xscale="log", xlim=(1, cycles[-1]), xlabel="merges and unmerges of a changing adapter")
        axes.set_ylim(0)
        axes.set_xticks([*SHOWN], [f"{count:,}" for count in SHOWN])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title("Drift of the frozen weights, as a share of the adapter's size", loc="left", fontweight="bold")
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share >= 0.1 else 1}g}%"


def main(arguments: list[str] | None = None) -> None:
    report.measure_or_redraw(sys.modules[__name__], ("torch", "peft", "loralib"), arguments)


if __name__ == "__main__":
    main()
