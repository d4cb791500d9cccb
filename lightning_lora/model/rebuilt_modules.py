"""Modules that are built anew around an injected model's layers or tensors keep what the record kept of the old ones.

A library may build a new module around the same network for each fit. A strategy may build new modules around the same
tensors, such as a SyncBatchNorm for a BatchNorm.
"""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from ..names import ATTRIBUTE
from .adapted_model import AdaptedModel
from .injection import BatchNormTensor, Kept
from .named_state import own_state


def adopt_layers(handle: AdaptedModel) -> None:
    """Let the root of a handle hold the record where it has replaced an earlier injected module. In place.

    Call it where layers can have changed.
    """
    record, root = handle.record, handle.root
    holder = record.holder()
    if holder is not root:
        if holder is not None:
            delattr(holder, ATTRIBUTE)
        record.begin(root)
    _follow_tensors(handle)


def note_owners(handle: AdaptedModel) -> None:
    """Note in the record which BatchNorm has which tensors now, for adopt_layers. In place.

    Modules of other classes are not rebuilt around the same tensors. Noting theirs would keep the tensors in memory.
    """
    modules = (module for _, module in handle.root_modules if isinstance(module, _BatchNorm))
    kept = ((module, handle.record.kept(module)) for module in modules)
    handle.record.batch_norms = {
        id(tensor): BatchNormTensor(tensor, each, leaf)
        for module, each in kept
        if each is not None
        for leaf, tensor in own_state(module).items()
    }


def _follow_tensors(handle: AdaptedModel) -> None:
    """Let a SyncBatchNorm around a BatchNorm's tensors keep what the record kept of the BatchNorm. In place."""
    owners = handle.record.batch_norms
    for _, module in handle.root_modules if owners else ():
        if isinstance(module, _BatchNorm) and handle.record.kept(module) is None:
            for leaf, tensor in own_state(module).items():
                if id(tensor) in owners:
                    _copy_kept(owners[id(tensor)], handle.record.keep(module), leaf)


def _copy_kept(owner: BatchNormTensor, kept: Kept, leaf: str) -> None:
    """Copy what is kept of one tensor of an owner to a tensor of the module that `kept` belongs to. In place."""
    earlier, name = owner.kept, owner.leaf
    if name in earlier.get("requires_grad", ()):
        kept.setdefault("requires_grad", {})[leaf] = earlier["requires_grad"][name]
    if name in earlier.get("initial", ()):
        kept.setdefault("initial", {})[leaf] = earlier["initial"][name]
    if name in earlier.get("marks", ()):
        kept.setdefault("marks", {})[leaf] = earlier["marks"][name]
