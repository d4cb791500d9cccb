"""Seeds: the values that adapters start from, with a seed and from the random stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject
from support.models.networks import base_zoo, bits, zoo_config
from support.runs.training import BuiltInConfigureModel, Data, Net, make_trainer
from support.runs.with_callback import TARGETS, lora


def drawn(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def injected(seed: int | None, stream: int, **options: Any) -> dict[str, bytes]:
    model = base_zoo()
    torch.manual_seed(stream)
    state = torch.get_rng_state()
    inject(model, zoo_config(**options), seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    return drawn(model)


@pytest.mark.parametrize(("init", "seed"), [(True, 0), (False, 1), ("gaussian", 2**63), ("orthogonal", 1)])
def test_inject_with_a_seed_draws_the_same_adapters_whatever_the_random_stream(seed: int, init: Any):
    found = [injected(seed, stream, init_lora_weights=init) for stream in (1, 2)]
    assert found[0] == found[1]
    assert found[0]["body.0.lora_A"] != found[0]["body.3.lora_A"]  # of one shape


@pytest.mark.parametrize("seed", [True, 1.0, "1"])
def test_a_seed_that_is_no_whole_number_is_refused_and_nothing_is_adapted(seed: Any):
    model = base_zoo()
    before = model.state_dict().keys()
    with pytest.raises(LoRAError, match="seed must be a whole number"):
        inject(model, zoo_config(), seed=seed)
    assert model.state_dict().keys() == before


def test_inject_with_other_seeds_draws_other_adapters():
    """An ensemble of adapters: each layer of each differs."""
    found = [injected(seed, 1) for seed in (None, 0, 1, 2)]
    for name in ("conv.lora_A", "body.0.lora_A", "body.3.lora_A", "embed.lora_B"):
        assert len({values[name] for values in found}) == len(found), name


def test_inject_without_a_seed_draws_from_the_state_of_the_random_stream():
    assert injected(None, 1) == injected(None, 1)
    assert injected(None, 1) != injected(None, 2)
    model = base_zoo()
    torch.manual_seed(1)
    inject(model, zoo_config())
    assert drawn(model) == injected(None, 1)


class Starts(L.Callback):
    """Notes the factors before the first step, and the random stream in setup."""

    def __init__(self) -> None:
        self.streams: list[torch.Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.streams.append(torch.get_rng_state())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = drawn(pl_module)


def started(path: Path, seed: int | None, stream: int, cls: type[Net] = Net) -> dict[str, bytes]:
    torch.manual_seed(stream)
    before, after = Starts(), Starts()
    make_trainer(path, before, lora(seed=seed), after).fit(cls(), Data())
    assert torch.equal(before.streams[0], after.streams[0])
    return after.found


def test_a_callback_with_a_seed_starts_from_the_same_adapters_and_without_one_from_the_random_stream(tmp_path):
    found = started(tmp_path, 5, 1)
    assert started(tmp_path, 5, 2, BuiltInConfigureModel) == found
    model = Net()
    inject(model, LoRAConfig(r=2, target_modules=TARGETS), seed=5)
    assert drawn(model) == found
    assert started(tmp_path, None, 1) != started(tmp_path, None, 2)


def test_a_whole_number_of_numpy_is_a_seed():
    numpy = pytest.importorskip("numpy")
    assert injected(numpy.int64(3), 1) == injected(3, 1)
