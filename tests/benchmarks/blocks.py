"""Merges of a weight that no cache holds, with other numbers of elements at a time; and peft's sums alone.

    python tests/benchmarks/run.py blocks --threads 1

Microseconds for a million elements in float32, medians of rounds in turns. With more threads, blocks are as many times
as large.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from stack import ALPHA, ours
from torch import nn

from lightning_lora import merge, unmerge
from lightning_lora.nn import exact_merge

POWERS = (18, 17, 16)
HEADER = f"| {' | '.join(f'ours, 2^{power} elements at a time' for power in POWERS)} | peft's sums alone |"
Cycle = tuple[Callable[[], object], Callable[[], object]]  # a merge and an unmerge


def cycles(shape: tuple[int, int], rank: int) -> dict[str, Cycle]:
    """The merge and the unmerge of each column, by our own functions and by sums as peft makes them."""
    torch.manual_seed(0)
    model = ours(nn.Sequential(nn.Linear(*shape, bias=False)), targets=["0"])
    weight = torch.randn(shape)
    left, right = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    product = torch.empty(shape)  # is kept: in new pages of memory, the sums would take several times as long

    def merge_with(power: int) -> Callable[[], object]:
        def merged() -> None:
            exact_merge.CPU_CHUNK = 2**power
            merge(model)

        return merged

    def add(sign: int) -> Callable[[], object]:
        return lambda: weight.add_(torch.mm(left, right, out=product).mul_(sign * ALPHA / rank))

    columns: dict[str, Cycle] = {f"2^{power}": (merge_with(power), lambda: unmerge(model)) for power in POWERS}
    return columns | {"peft": (add(1), add(-1))}


def measured(shape: tuple[int, int], rounds: int) -> list[str]:
    """The cells of the row."""
    found = cycles(shape, rank=8)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    kept = exact_merge.CPU_CHUNK
    try:
        for number in range(rounds + 1):  # the first one is not counted
            for name, pair in found.items():
                for function, seconds in zip(pair, times[name], strict=True):
                    began = time.perf_counter()
                    function()
                    seconds += [time.perf_counter() - began] if number else []
    finally:
        exact_merge.CPU_CHUNK = kept
    million = 1e6 / (shape[0] * shape[1]) * 1e6
    medians = [[million * statistics.median(seconds) for seconds in times[name]] for name in found]
    return [f"merge {merges:.0f}, unmerge {unmerges:.0f}" for merges, unmerges in medians]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rounds", type=int, default=17)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    print(f"| {' | '.join(measured(tuple(options.shape), options.rounds))} |")


if __name__ == "__main__":
    main()
