"""Reentrant activation checkpointing, which gives a segment gradients only where one of its inputs needs one.

With all but the adapters frozen none may, and torch only warns that the adapters inside are not trained. Where the
segments can be found, in transformers' models and torch's checkpoint_wrapper, their input is made to need a gradient.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction


def enable_input_require_grads(model: nn.Module) -> None:
    """Hook the inputs of reentrant segments, so that they need gradients, where that is not done yet."""
    for module in model.modules():
        if _is_trained_wrapper(module) and not _hooks(module._forward_pre_hooks):
            module.register_forward_pre_hook(_require_grad_before)
        embeddings = _embeddings_before_segments(module)
        if embeddings is not None and not _hooks(embeddings._forward_hooks):
            embeddings.register_forward_hook(_require_grad_after)


def disable_input_require_grads(model: nn.Module) -> None:
    """Take the hooks of enable_input_require_grads out again."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in _hooks(hooks):
                del hooks[key]


def records_gradients() -> bool:
    """Return whether gradients are recorded, or will be in the second pass of the reentrant segment that runs."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _hooks(hooks: Any) -> list[int]:
    return [key for key, hook in hooks.items() if hook in (_require_grad_before, _require_grad_after)]


def _is_trained_wrapper(module: nn.Module) -> bool:
    reentrant = getattr(vars(module).get("checkpoint_impl"), "name", "") == "REENTRANT"
    return reentrant and any(parameter.requires_grad for parameter in module.parameters())


def _embeddings_before_segments(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_input_embeddings", None)
    if not callable(getter) or not any(_is_segment(child) for child in module.modules()):
        return None
    try:
        embeddings = getter()
    except NotImplementedError:  # of a model around the one that has them
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def _is_segment(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
    return bool(getattr(module, "gradient_checkpointing", False)) and function is not None and bool(reentrant)


def _require_grad_before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
        return args
    return tuple(map(_requiring_grad, args))


def _require_grad_after(module: nn.Module, args: Any, output: Any) -> Any:
    return _requiring_grad(output)


def _requiring_grad(value: Any) -> Any:
    if not torch.is_grad_enabled() or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value if value.requires_grad else value.detach().requires_grad_()
