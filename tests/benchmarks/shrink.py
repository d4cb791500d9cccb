"""An adapter of rank 64 that is shrunk after training, beside adapters that were trained with lower ranks.

    python tests/benchmarks/run.py shrink --seeds 10

scikit-learn's digits: the base has learned them upright, and the adapter learns them rotated by 90 degrees, from 600
images. Each rank has the learning rate that is best on 400 other images; the figures are of the last 797. An adapter is
shrunk to the least ranks that keep a share of each layer's energy (the sum of squares of s * B @ A). It is then also
trained for 5 % more steps, with the learning rate of rank 64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import report
from lightning_lora import LoRAConfig, combine, inject, load_adapter, merged, take_adapter
from lightning_lora.adapter.adapter import Adapter

RANKS, RATES = (64, 32, 16, 8, 4, 2), (0.001, 0.003, 0.01)
SHARES = (0.999, 0.99, 0.95, 0.9, 0.8)
MORE = 0.05  # of the steps of the training, after an adapter was shrunk
DIRECT, SHRUNK, TRAINED = "trained with this rank", "shrunk to a share", "shrunk, and trained 5 % more"
NAMES = {DIRECT: "trained with r = {:g}", SHRUNK: "shrunk to {:g}", TRAINED: "shrunk to {:g}, trained 5 % more"}
RESULTS, PLOT = report.HERE / "shrink.json", report.HERE / "shrink.png"
BEGIN, END = "<!-- shrink: written by tests/benchmarks/shrink.py -->\n", "<!-- end of shrink -->"
HEADER = "| adapter | learning rate | ranks of the three layers | values | right | of the seeds |"
COLOURS = {DIRECT: "#c77b0a", SHRUNK: "#2a78b8", TRAINED: "#1a8a5a"}
Data = tuple[torch.Tensor, torch.Tensor]


def digits(*, rotated: bool) -> Data:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    return (x.rot90(dims=(1, 2)) if rotated else x).flatten(1), torch.tensor(labels)


def part(data: Data, begin: int, end: int | None = None) -> Data:
    return data[0][begin:end], data[1][begin:end]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def batches(data: Data, epochs: float) -> Iterator[torch.Tensor]:
    """Yield the rows of each batch of so many epochs, of which the last may be a part of one."""
    left = round(epochs * len(data[0]) / 50)
    while left > 0:
        for rows in torch.randperm(len(data[0])).split(50)[:left]:
            yield rows
            left -= 1


def fit_(model: nn.Module, data: Data, epochs: float, rate: float) -> None:
    """Train what requires gradients. In place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for rows in batches(data, epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()


@torch.no_grad()
def right(model: nn.Module, data: Data) -> float:
    with merged(model):
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def trained(base: nn.Module, r: int, rate: float, seed: int, epochs: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    inject(model := copy.deepcopy(base), LoRAConfig(r=r, lora_alpha=32))
    fit_(model, data, epochs, rate)
    return model


def measured(
    seeds: int = 10,
    epochs: int = 30,
    ranks: tuple[int, ...] = RANKS,
    shares: tuple[float, ...] = SHARES,
    rates: tuple[float, ...] = RATES,
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    fit_(base := network(), digits(rotated=False), epochs, 0.001)
    train, choose, judge = (part(digits(rotated=True), *ends) for ends in ((0, 600), (600, 1000), (1000,)))
    large: list[Adapter] = []
    rate_of_large = 0.0
    for r in ranks:
        models = {rate: [trained(base, r, rate, seed, epochs, train) for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: sum(right(model, choose) for model in models[rate]))
        adapters = [take_adapter(model) for model in models[best]]
        if not large:
            large, rate_of_large = adapters, best
        yield row(DIRECT, r, best, base, adapters, judge)
    for share in shares:
        shrunk = [combine([adapter], rank=share) for adapter in large]
        yield row(SHRUNK, share, rate_of_large, base, shrunk, judge)
        again = []
        for seed, adapter in enumerate(shrunk):
            torch.manual_seed(seed)
            load_adapter(model := copy.deepcopy(base), adapter)
            fit_(model, train, MORE * epochs, rate_of_large)
            again.append(take_adapter(model))
        yield row(TRAINED, share, rate_of_large, base, again, judge)


def row(how: str, rank: float, rate: float, base: nn.Module, adapters: list[Adapter], data: Data) -> dict[str, Any]:
    """The learning rate, the adapters' ranks and numbers of values (means), and the share of digits each gets right."""
    found = []
    for adapter in adapters:
        load_adapter(model := copy.deepcopy(base), adapter)
        found.append(right(model, data))
    ranks = zip(*([layer.r for layer in adapter.layers.values()] for adapter in adapters), strict=True)
    values = statistics.mean(sum(value.numel() for value in adapter.tensors.values()) for adapter in adapters)
    means = [statistics.mean(r) for r in ranks]
    return {"how": how, "rank": rank, "rate": rate, "ranks": means, "values": values, "right": found}


def markdown(content: dict[str, Any]) -> str:
    lines = [HEADER, "|---|---|---|---|---|---|"]
    for each in content["rows"]:
        ranks = ", ".join(f"{rank:.3g}" for rank in each["ranks"])
        found = [100 * share for share in each["right"]]
        cells = [NAMES[each["how"]].format(each["rank"]), f"{each['rate']:g}", ranks, f"{each['values']:.0f}"]
        cells += [f"{statistics.mean(found):.1f} %", f"{min(found):.1f} to {max(found):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(content: dict[str, Any]) -> str:
    """The table, and above it what it was measured with."""
    return f"{content['machine']}, {content['date']}, {content['seeds']} seeds:\n\n{markdown(content)}"


def plot(content: dict[str, Any]) -> Any:
    """A figure with the share of right digits over the mean rank."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 3.5), dpi=report.DPI, layout="constrained")
        axes = figure.subplots()
        for how, colour in COLOURS.items():
            rows = [each for each in content["rows"] if each["how"] == how]
            x, y = [statistics.mean(each["ranks"]) for each in rows], [statistics.mean(each["right"]) for each in rows]
            errors = [statistics.stdev(each["right"]) / len(each["right"]) ** 0.5 for each in rows]
            axes.errorbar(x, y, errors, marker="o", color=colour, lw=2, capsize=3, label=how)
        axes.set(xscale="log", xlabel="mean rank of the three layers")
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False)
        axes.set_title("Digits read right: mean and standard error of the seeds", loc="left", fontweight="bold")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the figures, and write table and picture of the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    machine = f"CPU, torch {version('torch')}, scikit-learn {version('scikit-learn')}"
    rows = [*measured(options.seeds, options.epochs)]
    content = {"machine": machine, "date": date.today().isoformat(), "seeds": options.seeds, "rows": rows}
    if options.keep:
        RESULTS.write_text(report.as_json(content))
        report.README.write_text(report.between(report.README.read_text(), BEGIN, END, page(content)))
        plot(content).savefig(PLOT)
    print(markdown(content))


if __name__ == "__main__":
    main()
