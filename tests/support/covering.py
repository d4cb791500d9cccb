"""Tables of three factors: every pair of values is tried each day, and the full product in the slow run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def covering(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[Any]:
    """Return the cases of a table, as parameters of pytest. `third` has the fewest values: so each pair is there."""
    assert len(third) <= min(len(first), len(second))
    cases = []
    for (i, one), (j, two), (k, three) in itertools.product(*map(enumerate, (first, second, third))):
        names = "-".join(getattr(value, "__name__", str(value)) for value in (one, two, three))
        marks = () if (i + j) % len(third) == k else pytest.mark.slow
        cases.append(pytest.param(one, two, three, id=names, marks=marks))
    return cases
