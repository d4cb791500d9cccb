"""An adapter of rank 64 that is shrunk after training, beside adapters that were trained with lower ranks.

    python tests/benchmarks/run.py shrink --seeds 10

scikit-learn's digits: the base has learned them upright, and the adapter learns them rotated by 90 degrees, from 600
images. Each rank has the learning rate that is best on 400 other images; the figures are of the last 797.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measure import table
from sklearn.datasets import load_digits
from torch import nn

from lightning_lora import LoRAConfig, combine, inject, load_adapter, merged, take_adapter

HEADER = "| adapter | ranks of the three layers | values | right | of the seeds |"
RANKS, RATES = (64, 32, 8), (0.001, 0.003, 0.01)
SHARES = (0.999, 0.99, 0.95)
Data = tuple[torch.Tensor, torch.Tensor]


def digits(*, rotated: bool) -> Data:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    return (x.rot90(dims=(1, 2)) if rotated else x).flatten(1), torch.tensor(labels)


def part(data: Data, begin: int, end: int | None = None) -> Data:
    return data[0][begin:end], data[1][begin:end]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fit_(model: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """Train what requires gradients. In place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(50):
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


def rows(seeds: int, epochs: int) -> Iterator[list[str]]:
    torch.manual_seed(0)
    fit_(base := network(), digits(rotated=False), epochs, 0.001)
    train, choose, judge = (part(digits(rotated=True), *ends) for ends in ((0, 600), (600, 1000), (1000,)))
    large: list[nn.Module] = []
    for r in RANKS:
        models = {rate: [trained(base, r, rate, seed, epochs, train) for seed in range(seeds)] for rate in RATES}
        best = max(RATES, key=lambda rate: sum(right(model, choose) for model in models[rate]))
        large = large or models[best]
        yield row(f"trained with r = {r}", base, [take_adapter(model) for model in models[best]], judge)
    for rank in (32, *SHARES, 8):
        shrunk = [combine([take_adapter(model)], rank=rank) for model in large]
        yield row(f"r = 64, shrunk to {rank}", base, shrunk, judge)


def row(name: str, base: nn.Module, adapters: list[Any], data: Data) -> list[str]:
    """The means over adapters of their ranks, sizes and shares of digits that are right."""
    found = []
    for adapter in adapters:
        load_adapter(model := copy.deepcopy(base), adapter)
        found.append(100 * right(model, data))
    ranks = zip(*([layer.r for layer in adapter.layers.values()] for adapter in adapters), strict=True)
    size = statistics.mean(sum(value.numel() for value in adapter.tensors.values()) for adapter in adapters)
    means = ", ".join(f"{statistics.mean(each):.3g}" for each in ranks)
    return [name, means, f"{size:.0f}", f"{statistics.mean(found):.1f} %", f"{min(found):.1f} to {max(found):.1f}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table(HEADER, rows(options.seeds, options.epochs))


if __name__ == "__main__":
    main()
