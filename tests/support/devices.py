"""The devices that one test body runs on: a pretended one, or a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from support.launches import count
from support.pretend_device import DEVICE, pretend_device

Place = Callable[[], AbstractContextManager[str]]
NO_GPUS = "there are no two GPUs: torch.cuda.device_count() is below 2"
NO_GPU = "there is no GPU: torch.cuda.is_available() is false"


@contextmanager
def cuda() -> Iterator[str]:
    """Compute on a GPU what can be compared with the CPU: without TF32, and the same numbers each time."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    wanted = _exact_products()
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield "cuda"
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _exact_products() -> list[tuple[Any, str, Any]]:
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    exact: list[tuple[Any, str, Any]]
    if hasattr(cudnn, "conv"):  # torch 2.9, where the older settings beside the newer ones are an error
        exact = [(place, "fp32_precision", "ieee") for place in (products, cudnn.conv, cudnn.rnn)]
    else:
        exact = [(place, "allow_tf32", False) for place in (products, cudnn)]
    return [(cudnn, "deterministic", True), *exact]


PLACES: dict[str, Place] = {"cuda": cuda, DEVICE: pretend_device, "cpu": lambda: nullcontext("cpu")}


def waits(device: str, work: Callable[[], object]) -> int:
    """Return how often the host waited for the device during `work`. The CPU never waits, so it is no device here."""
    if device == DEVICE:
        return count(work).waits
    assert device == "cuda"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in heard)


def finish(device: str) -> None:
    """Wait until the device has done all that it was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def captured(device: str, work: Callable[[], object]) -> Callable[[], object]:
    """Return what repeats `work` on the same tensors: a CUDA graph of it, or `work` itself on any other device."""
    if device != "cuda":
        return work
    # What a graph captures has to run before, on another stream.
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def pinned(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a tensor of the CPU in memory that a GPU copies from without waiting."""
    return tensor.pin_memory() if device == "cuda" else tensor


def streams(device: str) -> list[torch.Tensor]:
    """Return the states of all random streams that a program on this device draws from."""
    own = [torch.cuda.get_rng_state()] if device == "cuda" else []
    return [torch.get_rng_state(), *own]
