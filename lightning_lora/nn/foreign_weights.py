"""Which modules are linear layers of other libraries, and which of their tensors are the base's."""

from __future__ import annotations

from torch import nn

from ..names import names_factor
from .adapted_module import AdaptedModule


def is_foreign_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of another library: no nn.Linear, with in_features and out_features.

    Example::

        >>> is_foreign_linear(nn.Linear(2, 3))
        False
    """
    # hasattr(module, ...) takes several times longer, and is asked of every module.
    if isinstance(module, nn.Linear) or not ("in_features" in vars(module) or hasattr(type(module), "in_features")):
        return False
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(type(size) is int and size > 0 for size in sizes)


def is_of_base(module: nn.Module) -> bool:
    """Return whether what a module holds beside parameters is the base's: its buffers, and what it writes of its own.

    It is a foreign linear layer that is adapted, or that has its weight there. Others may hold what training changes. A
    weight that no tensor shows is not told from another.
    """
    if not is_foreign_linear(module):
        return False
    own = {name: tensor for name, tensor in module.named_parameters() if not names_factor(name)}
    is_weight = (tensor.is_floating_point() and tensor.dim() > 1 for tensor in own.values())
    shows_something = bool(own) or next(module.buffers(), None) is not None
    return shows_something and (isinstance(module, AdaptedModule) or not any(is_weight))


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is a foreign linear layer with integers, as packed weights are."""
    tensors = (*module._parameters.values(), *module._buffers.values()) if is_of_base(module) else ()
    return any(tensor is not None and not tensor.is_floating_point() for tensor in tensors)
