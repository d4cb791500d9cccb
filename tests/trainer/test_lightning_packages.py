"""Lightning's two names: the callbacks and LoRACLI belong to both, and none is imported for the other's sake."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from torch import nn

from lightning_lora.trainer.lightning_packages import PACKAGES, is_overridden, package_of
from support.ranks.processes import DONE, run_in_forks

THERE_FIRST = """
import sys
import {one}
from lightning_lora import LoRACallback, LoRACLI, LoRAMonitor
callback = LoRACallback()
assert isinstance(callback, {one}.Callback) and issubclass(LoRAMonitor, {one}.Callback)
assert {one}.Trainer(callbacks=callback, logger=False, accelerator="cpu").callbacks[0] is callback
assert issubclass(LoRACLI, {one}.cli.LightningCLI)
assert "{other}" not in sys.modules
import {other}
assert isinstance(callback, {other}.Callback) and issubclass(LoRAMonitor, {other}.Callback)
"""
THERE_LATER = """
import pickle, sys
from lightning_lora import LoRACallback, LoRAMonitor
class Mine(LoRACallback):
    pass
callbacks = [LoRACallback(r=2), Mine(r=3), LoRAMonitor(5)]
assert "pytorch_lightning" not in sys.modules
import pytorch_lightning
for callback in callbacks:
    assert pytorch_lightning.Trainer(callbacks=callback, logger=False, accelerator="cpu").callbacks[0] is callback
    assert repr(pickle.loads(pickle.dumps(callback))) == repr(callback)
    assert callback is callbacks[2] or pickle.loads(pickle.dumps(callback)).config == callback.config
    assert issubclass(type(callback), pytorch_lightning.Callback)
    assert isinstance(callback, __import__("lightning").pytorch.Callback)
"""
ORDERS = {
    "lightning first": THERE_FIRST.format(one="lightning.pytorch", other="pytorch_lightning"),
    "pytorch_lightning first": THERE_FIRST.format(one="pytorch_lightning", other="lightning.pytorch"),
    "pytorch_lightning later": THERE_LATER,
}


NEEDED_BY_BOTH = ["torch", "torchmetrics", "torch._dynamo"]  # most of the time that either takes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return run_in_forks({order: (NEEDED_BY_BOTH, program) for order, program in ORDERS.items()})


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_callback_is_that_of_each_package_as_soon_as_it_is_imported_and_imports_no_other(outcomes, order: str):
    assert outcomes[order] == DONE


@pytest.mark.parametrize("package", PACKAGES)
def test_methods_are_overridden_by_what_is_not_lightnings(package: str):
    base: Any = import_module(package).LightningModule

    class Plain(base):
        pass

    class Mixed(nn.Module):
        def setup(self, stage: str) -> None: ...

    class Mixin(Mixed, base):
        def configure_model(self) -> None: ...

    def overridden(cls: type) -> list[str]:
        return [name for name in ("setup", "configure_model", "nothing") if is_overridden(name, cls())]

    assert overridden(base) == overridden(Plain) == []
    assert overridden(Mixin) == ["setup", "configure_model"]
    model = Plain()
    model.configure_model = lambda: None
    assert is_overridden("configure_model", model)
    assert package_of(Mixin) == package
    assert package_of(Mixed) is None
