"""Tables of several factors: each two values meet every day, and with LORA_FULL=1 in the environment all of them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Case = tuple[tuple[int, Any], ...]  # a value of each factor, after its number among them


def covering(*factors: Sequence[Any], meet: int = 2, fits: Callable[..., bool] = lambda *case: True) -> list[Any]:
    """Return the cases of a table, as parameters of pytest: few of them, in which values of each two factors meet.

    With `meet=1` each value is in a case: for a table that repeats another one. What `fits` refuses is no case.
    """
    product = [case for case in itertools.product(*map(enumerate, factors)) if fits(*(value for _, value in case))]
    if os.environ.get("LORA_FULL"):
        return [_parameters(case) for case in product]

    def partners(case: Case) -> list[int]:  # so that the next value of one factor comes with the next of the others
        return [(number - case[0][0]) % len(factors[0]) for number, _ in case]

    missing, chosen = {met for case in product for met in _met(case, meet)}, []
    for new in range(math.comb(len(factors), meet), 0, -1):  # cases that bring the most come first
        for case in sorted(product, key=partners):
            if len(missing & _met(case, meet)) >= new:
                chosen.append(case)
                missing -= _met(case, meet)
    return [_parameters(case) for case in sorted(chosen, key=product.index)]


def _met(case: Case, meet: int) -> set[Any]:
    places = [(factor, number) for factor, (number, _) in enumerate(case)]
    return set(itertools.combinations(places, meet))


def _parameters(case: Case) -> Any:
    values = [value for _, value in case]
    return pytest.param(*values, id="-".join(getattr(value, "__name__", str(value)) for value in values))
