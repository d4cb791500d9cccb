"""Modules around modules: torch.compile's and activation checkpointing's, which put segments into names."""

from __future__ import annotations

from typing import cast

from torch import nn

COMPILED, CHECKPOINTED = WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, checkpoint_wrapper


def canonical(name: str) -> str:
    """A module or state name without the segments that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, which passes attributes on to it but does not hold them."""
    while COMPILED in model._modules:
        model = cast(nn.Module, model._modules[COMPILED])
    return model
