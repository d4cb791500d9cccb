"""Strategies that would give wrong results are refused at setup, before the model is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_lora import LoRAError
from support.models.networks import trace
from support.ranks.sharded import Plain
from support.ranks.sharded_adapters import lora


def deepspeed(stage: int = 2, **options: Any) -> Callable[[], Any]:
    """DeepSpeedStrategy with options of its config; those of ZeRO in a dictionary `zero`."""

    def build() -> Any:
        strategy: Any = object.__new__(DeepSpeedStrategy)  # its own __init__ needs the library
        zero = {"stage": stage, **options.pop("zero", {})}
        strategy.config = {"zero_optimization": zero, **options}
        return strategy

    return build


REFUSED = [
    (lambda: FSDPStrategy(use_orig_params=False), "FSDPStrategy cannot be used so: use_orig_params=False takes"),
    (lambda: FSDPStrategy(ignored_modules=[]), "FSDPStrategy cannot be used so: torch takes ignored_modules or"),
    (deepspeed(0), "its stage is 0, and 1, 2 and 3 are supported"),
    (deepspeed(zero={"offload_optimizer": {"device": "nvme"}}), "offload_optimizer to NVMe"),
    (deepspeed(zero={"offload_param": {"device": "nvme"}}), "offload_param to NVMe"),
    (deepspeed(zero={"zero_quantized_weights": True}), r"zero_quantized_weights \(ZeRO\+\+\)"),
    (deepspeed(zero={"zero_quantized_gradients": True}), r"zero_quantized_gradients \(ZeRO\+\+\)"),
    (deepspeed(zero={"round_robin_gradients": True}), "round_robin_gradients keeps states in another order"),
    (deepspeed(zero={"zero_hpz_partition_size": 2}), r"zero_hpz_partition_size \(ZeRO\+\+\)"),
    (deepspeed(3, zero={"mics_shard_size": 2}), r"mics_shard_size \(MiCS\)"),
    (deepspeed(3, zero={"zenflow": {"topk_ratio": 0.1}}), "zenflow keeps a part"),
    (deepspeed(tensor_parallel={"autotp_size": 2}), "autotp_size splits layers"),
]


@pytest.mark.parametrize(("strategy", "reason"), REFUSED)
def test_strategy_that_cannot_be_right_is_refused_with_the_alternative(strategy, reason):
    model = Plain()
    before = trace(model)
    trainer = SimpleNamespace(strategy=strategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    with pytest.raises(LoRAError, match=reason) as caught:
        lora().setup(trainer, model, "fit")
    assert "ModelParallelStrategy with fully_shard (FSDP2)" in str(caught.value)
    assert "strategy='ddp'" in str(caught.value)
    assert trace(model) == before


@pytest.mark.parametrize("strategy", [lambda: ModelParallelStrategy(), lambda: FSDPStrategy(), deepspeed(3)])
def test_full_checkpoint_of_a_base_that_a_strategy_divides_is_refused_with_the_alternatives(strategy):
    trainer = SimpleNamespace(strategy=strategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    before = trace(model := Plain())
    with pytest.raises(LoRAError, match="save='full' is for a base that each rank holds whole, and ") as caught:
        lora(save="full").setup(trainer, model, "fit")
    assert "Use save='adapter' or save='merged', or strategy='ddp'" in str(caught.value)
    assert trace(model) == before


def test_deepspeed_without_its_package_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    trainer = SimpleNamespace(strategy=deepspeed()(), callbacks=[], state=SimpleNamespace(fn="fit"))
    with pytest.raises(LoRAError, match=r"not installed. Run pip install 'lightning-lora\[deepspeed\]'"):
        lora().setup(trainer, Plain(), "fit")


@pytest.mark.parametrize("name", ["_setup_model", "load_model_state_dict"])
def test_strategy_of_another_lightning_is_refused_by_the_method_that_it_lacks(monkeypatch, name):
    """Otherwise FSDP1 would flatten the adapter, and slices would be saved as whole weights."""
    for owner in [cls for cls in FSDPStrategy.__mro__ if name in vars(cls)]:
        monkeypatch.delattr(owner, name)
    trainer = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[], state=SimpleNamespace(fn="fit"))
    with pytest.raises(LoRAError, match=f"FSDPStrategy: it has no method {name!r}, .* install an older one"):
        lora().setup(trainer, Plain(), "fit")
