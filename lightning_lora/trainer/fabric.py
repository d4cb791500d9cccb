"""Fabric calls no hook of a Trainer, so that a callback in its list would do nothing: an error shows what does it."""

from __future__ import annotations

from ..config import LoRAConfig
from ..errors import LoRAError


def refuse_callback(config: LoRAConfig) -> None:
    """Raise LoRAError for a LoRACallback in Fabric's list, with the calls that do its work."""
    options = ", ".join(f"{name}={getattr(config, name)!r}" for name in config.differing(LoRAConfig()))
    raise LoRAError(
        "LoRACallback: Fabric calls no hook of a Trainer, so this callback does nothing in its list. Take it out, and "
        f"write `inject(model, LoRAConfig({options}))` before fabric.setup, `with merged(model):` around an "
        "evaluation, and `save_adapter(model, path)` to save. examples/fabric.py shows fabric.save and fabric.load too."
    )
