"""Paired rounds, medians of their ratios, peaks of the bytes that are held, and tables in Markdown."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Times = dict[str, list[float]]


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float, device: str) -> Times:
    """Seconds of each function, in rounds that call every one once, for about that long; two rounds are not counted.

    The order changes from round to round, because a call finds the caches and the heap as the one before left them.
    """
    times: Times = {name: [] for name in functions}
    draw = random.Random(0)
    started, rounds = time.perf_counter(), 0
    while rounds < 9 or time.perf_counter() - started < seconds:
        for name in draw.sample(list(functions), len(functions)):
            elapsed = _timed(functions[name], device)
            if rounds >= 2:
                times[name].append(elapsed)
        rounds += 1
    return times


def _timed(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def milliseconds(times: Times, *names: str) -> float:
    """Median of a round's sum over these functions."""
    return 1e3 * statistics.median(map(sum, zip(*(times[name] for name in names), strict=True)))


def ratio(times: Times, over: list[str], under: list[str]) -> float:
    """Median over the rounds of the ratio of two sums."""
    rounds = zip(
        zip(*(times[name] for name in over), strict=True),
        zip(*(times[name] for name in under), strict=True),
        strict=True,
    )
    return statistics.median(sum(top) / sum(bottom) for top, bottom in rounds)


def table(header: str, rows: Iterable[list[str]]) -> None:
    """Print a table in Markdown, row by row as they are measured."""
    print(f"{header}\n|{'---|' * (header.count('|') - 1)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def against(value: float) -> str:
    """A ratio to another package as a cell, bold where that one is faster or leaner."""
    text = f"{value:.2f}"
    return f"**{text}**" if float(text) > 1 else text


def peak_bytes(function: Callable[[], Any], device: str, warm_up: Callable[[], Any] | None = None) -> int:
    """Peak of the bytes that a call allocates beside what was there, as torch's own allocators count them.

    Another call comes before it, because a first one allocates buffers that stay: the same, unless warm_up is given.
    """
    (warm_up or function)()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    return max(held_bytes(function), default=0)


def held_bytes(function: Callable[[], Any]) -> list[int]:
    """Bytes that a call holds on the CPU after each allocation and each release, beside what was there.

    No garbage is collected meanwhile, for what is older would count as released by the call.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
