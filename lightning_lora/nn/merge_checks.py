"""Numbers that a device computes while a verb runs, read by the host together.

Reading one number makes the host wait until the device has done everything before it. A merge needs several numbers of
each weight: whether W' is finite, and sums of its bits. They are collected here and read at once, so that the host
waits as often for many layers as for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # that hold the bits of floats


class Reading:
    """A number that a device computes. It is read when it is first asked for, with all others of the same Checks."""

    def __init__(self, checks: Checks) -> None:
        self.checks: Checks | None = checks
        self.number: float = 0

    def get(self) -> float:
        """Return the number, an int or a float; waits for the device if it was not read yet."""
        if self.checks is not None:
            self.checks.read()
        return self.number

    def is_finite(self) -> bool:
        """Return whether the number is finite, as `get`."""
        return math.isfinite(self.get())

    def set_(self, number: float) -> None:
        """Take the number. In place."""
        self.number, self.checks = number, None


class Checks:
    """The numbers of one verb that were asked for and not read yet."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, list[Reading]]] = []
        self.later: list[tuple[Callable[[], torch.Tensor], list[Reading]]] = []

    def ask(self, numbers: torch.Tensor) -> list[Reading]:
        """Return a Reading for each of some numbers on a device.

        Args:
            numbers: a scalar or (n,); int64, float32 or float64.
        """
        readings = [Reading(self) for _ in range(numbers.numel())]
        self.asked.append((numbers.detach().reshape(-1), readings))
        return readings

    def ask_later(self, count: int, compute: Callable[[], torch.Tensor]) -> list[Reading]:
        """Return a Reading for each of some numbers that are computed when the first number of these Checks is read.

        Args:
            count: of the numbers.
            compute: returns them, as `ask` takes them.
        """
        readings = [Reading(self) for _ in range(count)]
        self.later.append((compute, readings))
        return readings

    def read(self) -> None:
        """Read all numbers that were asked for: one wait for each device that computes some."""
        while self.later:
            compute, readings = self.later[0]
            self.asked.append((compute().detach().reshape(-1), readings))
            del self.later[0]
        asked = list(self.asked)
        for device in dict.fromkeys(numbers.device for numbers, _ in asked):
            of_device = [(numbers, readings) for numbers, readings in asked if numbers.device == device]
            # The bits of floats travel as integers, because one tensor is read for all.
            bits = [_as_integers(numbers) for numbers, _ in of_device]
            found = torch.split(torch.cat(bits).cpu(), [len(numbers) for numbers in bits])
            for (numbers, readings), part in zip(of_device, found, strict=True):
                for reading, number in zip(readings, _as_dtype(part, numbers.dtype).tolist(), strict=True):
                    reading.set_(number)
        del self.asked[: len(asked)]


def _as_integers(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(INTEGERS[numbers.dtype]) if numbers.is_floating_point() else numbers


def _as_dtype(integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return integers.to(INTEGERS[dtype]).view(dtype) if dtype.is_floating_point else integers
