"""The devices that one test body runs on, a pretended one or a GPU, and counts of what the first is asked to do.

An operator counts as one kernel, and views as none. So this says nothing of the kernels of one operator, of speed, and
of the time that the host takes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils import _pytree as pytree

from support.devices.pretend_device import DEVICE, OBSERVERS, Pretend, pretend_device

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


NO_KERNEL = {  # beside views: they allocate, or say something of a tensor
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "set_"),
    *("t_", "transpose_", "squeeze_", "unsqueeze_", "detach_"),
}
WAITS = {  # the host reads a value, or a shape that depends on values
    *("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "repeat_interleave"),
}


NUMBERS = ("launches", "bytes", "float64", "waits")


@dataclass(frozen=True)
class Count:
    """What a device was asked to do.

    Attributes:
        launches: operators that are no views.
        bytes: what these read and write.
        float64: those with a float64 tensor of a dimension or more.
        waits: those for which the host waits.
        operators: the launched ones by their names, to look at.
    """

    launches: int = 0
    bytes: int = 0
    float64: int = 0
    waits: int = 0
    operators: Counter[str] = field(default_factory=Counter, compare=False)

    def __sub__(self, other: Count) -> Count:
        operators = Counter(self.operators)
        operators.subtract(other.operators)
        left = {name: number for name, number in operators.items() if number}
        numbers = {name: getattr(self, name) - getattr(other, name) for name in NUMBERS}
        return Count(**numbers, operators=Counter(left))


def count(work: Callable[[], object]) -> Count:
    """Run `work` inside `pretend_device` and count what the device was asked to do."""
    numbers, operators = dict.fromkeys(NUMBERS, 0), Counter[str]()

    def observe(func: Any, given: Any, made: Any) -> None:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.is_view or name in NO_KERNEL:
            return
        tensors = [leaf for leaf in pytree.tree_leaves((given, made)) if isinstance(leaf, torch.Tensor)]
        numbers["launches"] += 1
        numbers["bytes"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        numbers["float64"] += any(tensor.dtype == torch.float64 and tensor.dim() > 0 for tensor in tensors)
        numbers["waits"] += name in WAITS or _comes_back(name, given, made)
        operators[name] += 1

    OBSERVERS.append(observe)
    try:
        work()
    finally:
        OBSERVERS.remove(observe)
    return Count(**numbers, operators=operators)


def _comes_back(name: str, given: Any, made: Any) -> bool:
    """Whether a copy goes from the device to the CPU."""
    if name not in ("_to_copy", "copy_") or made.device.type == DEVICE:
        return False
    return any(isinstance(leaf, Pretend) for leaf in pytree.tree_leaves(given))


class PretendAccelerator(Accelerator):
    """One pretended device."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != DEVICE:
            raise RuntimeError(f"the device should be {DEVICE}, but it is {device}")

    def teardown(self) -> None:
        """There is nothing to free."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE


def on_the_device(device: str = DEVICE, precision: str = "32-true") -> dict[str, Any]:
    """Options of a Trainer that runs on a device."""
    if device != DEVICE:
        return {"accelerator": device, "devices": 1, "precision": precision}
    options: dict[str, Any] = {
        "accelerator": "auto",
        "strategy": SingleDeviceStrategy(device=torch.device(DEVICE, 0), accelerator=PretendAccelerator()),
    }
    if precision.endswith("mixed"):  # Lightning would ask for CUDA's autocast
        return options | {"plugins": [MixedPrecision(precision, DEVICE)]}  # type: ignore[arg-type]
    return options | {"precision": precision}
