"""Let adapters train inside reentrant activation checkpointing.

With reentrant checkpointing a segment gets gradients only if one of the segment's inputs requires a gradient. If the
base is frozen, possibly no input does, and the adapters inside are not trained.

In transformers' models and in torch's checkpoint_wrapper the segments can be found, and their input is made to require
a gradient. Elsewhere adapted layers note that they ran in a segment, and the warning about missing gradients says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

CHECKPOINT = "_gradient_checkpointing_func"  # attribute in which transformers keeps its checkpointing function

# For messages about segments that cannot be found.
REENTRANT = "torch.utils.checkpoint with use_reentrant=True, which trains nothing where no input requires a gradient"
REENTRANT_REMEDY = (
    "Use use_reentrant=False, which needs none, or call requires_grad_() on a floating-point input of the segment"
)


class CheckpointWithInputGrads:
    """Wraps transformers' checkpointing function so that each segment gets an input that requires a gradient."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, segment: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a segment of the model, checkpointed."""
        return self.function(segment, *_requiring_grad(args), **kwargs)


def enable_input_require_grads(modules: Collection[nn.Module]) -> None:
    """Make the inputs of reentrant segments require gradients. In place.

    Segments in which nothing is trained are left alone. Repeated calls change nothing more.

    Args:
        modules: all modules of a model.
    """
    for module in modules:
        if _is_reentrant_wrapper(module) and _is_trained(module) and not _hooks(module):
            module.register_forward_pre_hook(_require_grad_before)
    for segment, owner in _segments(modules).items():
        if _is_trained(owner):
            setattr(segment, CHECKPOINT, CheckpointWithInputGrads(vars(segment)[CHECKPOINT]))


def disable_input_require_grads(modules: Iterable[nn.Module]) -> None:
    """Undo enable_input_require_grads in these modules. In place."""
    for module in modules:
        for key in _hooks(module):
            del module._forward_pre_hooks[key]
        function = vars(module).get(CHECKPOINT)
        if isinstance(function, CheckpointWithInputGrads):
            setattr(module, CHECKPOINT, function.function)


def records_gradients() -> bool:
    """Return whether gradients are recorded, now or in the second pass of the reentrant segment that runs now."""
    return torch.is_grad_enabled() or in_first_pass()


def in_first_pass() -> bool:
    """Return whether a reentrant segment runs its first pass, in which no gradients are recorded.

    The segment runs in the forward of an autograd function. There torch switches forward-mode derivatives off as well,
    and torch.no_grad does not; this tells the two apart.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return not torch._C._is_fwd_grad_enabled()


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is _require_grad_before]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_reentrant_wrapper(module: nn.Module) -> bool:
    return getattr(vars(module).get("checkpoint_impl"), "name", "") == "REENTRANT"


def _segments(modules: Collection[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return the modules with transformers' reentrant checkpointing, each with the innermost model that contains it."""
    segments = {module: module for module in modules if _is_segment(module)}
    for owner in modules if segments else ():
        if hasattr(owner, "_set_gradient_checkpointing"):
            segments.update((module, owner) for module in owner.modules() if module in segments)
    return segments


def _is_segment(module: nn.Module) -> bool:
    function = vars(module).get(CHECKPOINT)
    if function is None or isinstance(function, CheckpointWithInputGrads):
        return False
    reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
    return bool(getattr(module, "gradient_checkpointing", False)) and bool(reentrant)


def _require_grad_before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _requiring_grad(args)


def _requiring_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments. If none requires a gradient, the first floating-point tensor is replaced by one that does.

    Outside of gradient recording the arguments are returned unchanged.
    """
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is None or not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return args
    return tuple(arg.detach().requires_grad_() if arg is first else arg for arg in args)
