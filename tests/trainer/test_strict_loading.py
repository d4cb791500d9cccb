"""A load through ModelParallelStrategy leaves the user's strict_loading as it was."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora.trainer.strategies import prepare_strategy
from support.runs import lora, trained
from support.training import Net


class ModelParallelStrategy:
    """What Lightning's has that loading needs."""

    def __init__(self, module: L.LightningModule, fails: bool) -> None:
        self.lightning_module, self.fails = module, fails
        self.strict: list[bool] = []
        self.optimizers: list[Any] = []

    def broadcast(self, value: Any) -> Any:
        return value

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.strict.append(self.lightning_module.strict_loading)
        if self.fails:
            raise OSError("the disk is gone")
        content: dict[str, Any] = torch.load(checkpoint_path, weights_only=True)
        return content


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_a_load_through_model_parallel_strategy_leaves_strict_loading_as_the_user_set_it(
    tmp_path, kind: str, own: bool | None, fails: bool
):
    model = trained(tmp_path, Net(), lora(save=kind))
    model.trainer.save_checkpoint(tmp_path / "one.ckpt")
    if own is not None:
        model.strict_loading = own
    strategy = ModelParallelStrategy(model, fails)
    prepare_strategy(strategy)
    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            strategy.load_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    else:
        strategy.load_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert strategy.strict == [False]
    assert model._strict_loading is own
