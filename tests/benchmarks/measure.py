"""Timing and memory: paired rounds, medians of the rounds' ratios, live and resident bytes."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Times = dict[str, list[float]]


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float, device: str) -> Times:
    """Seconds of each function, in rounds that call every one once, for about that long; two rounds are not counted."""
    times: Times = {name: [] for name in functions}
    started, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - started < seconds:
        for name, function in functions.items():
            elapsed = _timed(function, device)
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


def overhead(times: Times, mine: str, other: str, floor: str) -> float:
    """What mine costs over the floor, as a share of what other costs over it; medians of the rounds."""
    extra = {
        name: statistics.median(a - b for a, b in zip(times[name], times[floor], strict=True)) for name in (mine, other)
    }
    return extra[mine] / extra[other]


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), before)
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        if storage._cdata in before or storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Peak of the bytes that a call allocates beside what was there: torch's own count on CUDA, live tensors on CPU."""
    function()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        function()
    return live.peak


def resident_bytes(function: Callable[[], Any]) -> int:
    """How far a call raises the process's resident memory at its peak (Linux; 0 elsewhere)."""
    function()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the high-water mark
    except OSError:
        return 0
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


@contextlib.contextmanager
def _saving(sizes: dict[int, int]) -> Iterator[None]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def saved_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward keeps for backward, beside parameters; each storage counts once."""
    sizes: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    with _saving(sizes):
        output = model(x.detach().requires_grad_())
    kept = sum(size for key, size in sizes.items() if key not in parameters)
    del output
    return kept
