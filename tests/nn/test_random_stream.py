"""The package draws torch's random numbers from streams that it shares with no device of the user's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora
from lightning_lora import LoRAConfig, combine, initialize_from_data, inject
from lightning_lora.adapter.products import truncated_svd
from lightning_lora.nn.random_stream import svd_lowrank
from support.covering import covering
from support.models.networks import checkpoint


def started(init: Any) -> Any:
    torch.default_generator.manual_seed(3)  # of the CPU alone
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject(model, LoRAConfig(r=2, init_lora_weights=init, target_modules=["0", "1"]), seed=1)
    if init in ("eva", "lora_ga"):
        initialize_from_data(model, [torch.randn(20, 6)] * 3, lambda net, batch: net(batch).sum())
    return model


def combined(how: str) -> Any:
    state = checkpoint(started(False), "adapter")
    return combine([state, state], [0.5, 0.5], method=how, density=0.5, rank=2)


DOORS: dict[str, Callable[[], object]] = {
    **{str(init): lambda init=init: started(init) for init in (True, False, "gaussian", "orthogonal")},  # type: ignore[misc]
    **{init: lambda init=init: started(init) for init in ("pissa", "pissa_niter_2", "olora", "eva", "lora_ga")},  # type: ignore[misc]
    "dare": lambda: combined("dare_linear"),
    "a large matrix": lambda: truncated_svd(torch.ones(600, 520), 4),
}


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("the streams of all devices were seeded")


def test_no_door_seeds_the_streams_of_the_users_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch, "seed", refuse)
    for module in (torch.random, torch.cuda, torch.cuda.random, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "fork_rng", "set_rng_state"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    for name, door in DOORS.items():
        try:
            door()
        except AssertionError as error:
            raise AssertionError(name) from error


def test_one_file_makes_generators() -> None:
    package = Path(lightning_lora.__file__).parent
    seeding = re.compile(r"manual_seed\(|fork_rng\(|torch\.Generator\(")
    assert [path.name for path in package.rglob("*.py") if seeding.search(path.read_text())] == ["random_stream.py"]


@pytest.mark.parametrize(
    ("shape", "dtype"), covering([(30, 20), (20, 30), (5, 5)], [torch.float32, torch.float64], meet=1)
)
def test_svd_is_torchs_after_the_same_seed_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        wanted = torch.svd_lowrank(matrix, q=4, niter=3)
    state = torch.get_rng_state()
    found = svd_lowrank(matrix, 4, 3, seed=7)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(torch.get_rng_state(), state)
