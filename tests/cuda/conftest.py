"""Everything that the pretended device runs, on a GPU: `pytest -m cuda`. Without a GPU it is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.devices import NO_GPU, PLACES, Place

ROOM = os.environ.get("CUDA_TESTS_ON", "cuda")  # "pretend" runs these files without a GPU, to see that they run
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.cuda)
    if ROOM == "cuda" and not torch.cuda.is_available():
        slow_first = sorted(here, key=lambda item: item.get_closest_marker("slow") is None)
        first = {(item.path, getattr(item, "originalname", item.name)): item for item in slow_first}
        for item in first.values():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        others = {id(item) for item in here} - {id(item) for item in first.values()}
        items[:] = [item for item in items if id(item) not in others]  # one case of each test says it for all


@pytest.fixture
def a_device() -> Place:
    return PLACES[ROOM]


@pytest.fixture
def compiling_device() -> Iterator[str]:
    with PLACES["cpu" if ROOM == "pretend" else ROOM]() as name:
        yield name
