"""What a Trainer needs to run on the pretended device, or on another one."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from support.pretend_device import DEVICE


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
