"""Let adapters train inside reentrant activation checkpointing.

With reentrant checkpointing a segment gets gradients only if one of the segment's inputs requires a gradient. If the
base is frozen, possibly no input does, and the adapters inside are not trained.

In transformers' models and in torch's checkpoint_wrapper the segments can be found, and their input is made to require
a gradient. Elsewhere adapted layers note that they ran in a segment, and the warning about missing gradients says so.

A segment of either kind that is computed again for its backward must run with the strengths of its forward; see
StrengthLog.
"""

from __future__ import annotations

import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import nn

from ..errors import LoRAError

CHECKPOINT = "_gradient_checkpointing_func"  # attribute in which transformers keeps its checkpointing function

# For messages about segments that cannot be found.
REENTRANT = "torch.utils.checkpoint with use_reentrant=True, which trains nothing where no input requires a gradient"
REENTRANT_REMEDY = (
    "Use use_reentrant=False, which needs none, or call requires_grad_() on a floating-point input of the segment"
)

# Private functions of torch that StrengthLog needs, all there from torch 2.6 to 2.13.
NUMBERS = ("_autograd._get_sequence_nr", "_current_graph_task_id", "_current_autograd_node")
RECOMPUTING = ("backward", "unpack_hook")  # functions of torch.utils.checkpoint that compute a segment again


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
    segments: dict[nn.Module, nn.Module] = {}  # of transformers, each with the innermost model that contains it
    for module in modules:
        is_wrapper = getattr(vars(module).get("checkpoint_impl"), "name", "") == "REENTRANT"  # torch's
        if is_wrapper and _is_trained(module) and not _hooks(module):
            module.register_forward_pre_hook(_require_grad_before)
        function = vars(module).get(CHECKPOINT)
        if function is None or isinstance(function, CheckpointWithInputGrads):
            continue
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            segments[module] = module
    for owner in modules if segments else ():  # outer modules come before inner ones, so the innermost stays
        if hasattr(owner, "_set_gradient_checkpointing"):
            segments.update((module, owner) for module in owner.modules() if module in segments)
    for segment, owner in segments.items():
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
    forward_mode = _of_torch("_is_fwd_grad_enabled")
    if forward_mode is None:  # slower, and torch.no_grad inside of a segment counts as its first pass
        return _segments_around(("forward",)) > 0
    return not forward_mode()


class StrengthLog:
    """Which strengths `scaled` and `disable_adapter` have set, and from which autograd node on.

    torch numbers the nodes of graphs in the order in which a thread makes them. While a segment is computed again, the
    node that runs tells by its number which strengths its forward had. Blocks in which no node is made leave nothing
    behind. Checkpointing of other libraries (DeepSpeed's own) is not followed.

    The numbers have private names in torch. In a version without them nothing is noted or refused, and a warning tells.
    """

    KEPT = 1000  # of the latest changes; graphs from before them are not checked

    def __init__(self) -> None:
        self.since: list[int] = []  # ascending numbers of the first node with each of the following
        self.states: list[dict[str, float]] = []  # the strengths that differ from those of the model, by name

    @property
    def now(self) -> dict[str, float]:
        """The strengths that the innermost block outside of segments has set."""
        return self.states[-1] if self.states else {}

    def change(self, state: Mapping[str, float]) -> None:
        """Note that other strengths act from here on. In place.

        A block inside of a segment is entered again when the segment is computed again, so it is not noted.
        """
        if self.now == state or _segments_around():
            return
        if not all(map(_of_torch, NUMBERS)):
            warnings.warn(
                f"lightning_lora: torch {torch.__version__} does not number autograd's nodes as this package expects, "
                "so a backward of checkpointed layers in another `scaled` or `disable_adapter` block than their "
                "forward is not refused. Call backward() inside of the block of its forward.",
                stacklevel=2,
            )
            return
        number = torch._C._autograd._get_sequence_nr()
        if not self.states:
            self.since, self.states = [-1], [{}]
        while self.since and self.since[-1] >= number:  # no node was made since
            del self.since[-1], self.states[-1]
        if self.now != state:
            self.since.append(number)
            self.states.append(dict(state))
        if self.states == [{}]:
            self.since, self.states = [], []
        del self.since[: -self.KEPT], self.states[: -self.KEPT]

    def check(self, name: str) -> None:
        """Raise LoRAError where a layer is computed again with other strengths than it had in its forward."""
        # Where segments lie inside of one another the outer was checked. On a GPU the nodes of the inner one are made
        # by another thread, which has numbers of its own.
        if torch._C._current_graph_task_id() == -1 or _segments_around(RECOMPUTING) != 1:
            return
        node = torch._C._current_autograd_node()
        number = getattr(node, "_sequence_nr", None)  # None also where no node runs
        place = bisect_right(self.since, number()) if number is not None else 0
        if place and self.states[place - 1] != self.now:
            raise LoRAError(
                f"{name!r}: activation checkpointing computes the layer again for its backward, and the forward ran "
                f"{_where(self.states[place - 1])} and the backward runs {_where(self.now)}, so that gradients would "
                "be wrong. Call backward() where the forward ran: inside of the same block, or outside of any."
            )


def _of_torch(path: str) -> Callable[..., Any] | None:
    """Return a private function of torch by its path in torch._C, or None where this version of torch lacks it."""
    found: Any = torch._C
    for name in path.split("."):
        found = getattr(found, name, None)
    return cast("Callable[..., Any] | None", found)


def _where(state: Mapping[str, float]) -> str:
    return f"inside of a block with the strengths {dict(state)}" if state else "outside of scaled and disable_adapter"


def _segments_around(functions: Collection[str] = ()) -> int:
    """Return how many calls of torch.utils.checkpoint the present one is inside of; by default of any function."""
    found, frame = 0, sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        found += code.co_filename == torch.utils.checkpoint.__file__ and (not functions or code.co_name in functions)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is _require_grad_before]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


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
