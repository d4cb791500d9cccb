"""The record of an injection: its options, and the facts about the model that later calls need.

An injected model has one record. The injected module and each adapted layer hold it, so that it can be found from any
module that holds the layers: the injected module, a module around it, a network inside it, or a new module around the
same network.

Facts about one module or its tensors are kept in that module, see Kept. They stay with the module under any name. A
copy of the model has its own facts, and a new module has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import copy_of
from ..errors import LoRAError
from ..names import ATTRIBUTE, KEPT
from ..nn.owner import Owner

ALL_OPTIONS = frozenset(option.name for option in fields(LoRAConfig))

# Of a base parameter. "trained": it was trainable at some time. "unfrozen": the options did not make it trainable.
# "untold": no warning has said so yet. "resized": it is saved because it was resized before injection.
Mark = Literal["trained", "unfrozen", "untold", "resized"]


class Kept(TypedDict, total=False):
    """The facts that the record keeps of one module and its own tensors. Tensors go by their names in the module.

    The types are plain, so that a module that is pickled by itself needs no class of this package. Empty entries are
    left out, because a large model has thousands of modules.
    """

    of: list[Any]  # the record's token; a module that was copied by itself has a token of no record, see kept
    requires_grad: dict[str, bool]  # of base parameters, before injection
    initial: dict[str, torch.Tensor]  # values from before training of trained base parameters and persistent buffers
    marks: dict[str, set[str]]  # the Marks of base parameters
    layers: dict[str, str]  # adapted layers inside: the name in this module, and the name at injection
    left_out: str  # why "all-linear" or "all-layers" leaves this layer out
    scope: bool  # the options name biases and whole modules in this module alone


class BatchNormTensor(NamedTuple):
    """A tensor, what is kept of the module that had it, and the tensor's name in that module."""

    tensor: torch.Tensor  # no weak reference, because torch cannot swap a tensor that has one
    kept: Kept
    leaf: str


# What LoRACallback notes while a Trainer runs. A copy of the model is in no run.
OF_A_RUN = (
    *("dropping", "merged_here", "merged_in_fit", "stays_unmerged"),
    *("epoch_begins", "looked_at", "fits", "fit_ended"),
)


@dataclass
class Injection:
    """The record of one injection."""

    config: LoRAConfig
    merge_weights: bool = False  # eval() merges and train() unmerges
    given: frozenset[str] = ALL_OPTIONS  # names of the options that the user gave
    layers: list[str] = field(default_factory=list)  # names that the adapted layers had in the injected module
    merged_eval: bool | None = None  # LoRACallback's option; None without a callback
    save: Any = None  # the kind of Lightning checkpoint; None without a callback, which leaves checkpoints unfiltered
    quantize: str | None = None  # LoRACallback's option: how layers that are built later are quantised
    dequantize: Any = None  # the dtype of quantised weights in merged checkpoints
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of the base at fit start, by LightningModule's names
    origin: dict[str, str] = field(default_factory=dict)  # what a loaded adapter's file says of its base, see Adapter
    validated: bool = False  # finish_injection has checked that each entry of the options names something
    seed: str = ""  # the text that adapters are drawn from; "" means the state of the random stream
    merged: bool = False  # merge was called, and since then unmerge was not called for all layers
    dropping: bool = False  # a training batch runs, in which dropout acts in layers that are kept in eval mode too
    merged_here: bool = False  # LoRACallback has merged the model, and is to unmerge it
    merged_in_fit: bool = False  # an evaluation of this fit ran merged
    stays_unmerged: bool = False  # merging found a value that is not finite, so this evaluation runs unmerged
    epoch_begins: bool = False  # no training batch of the epoch has begun
    looked_at: frozenset[int] = frozenset()  # ids of the fit's optimizers whose adapters were looked at for gradients
    fits: int = 0  # how many fits of the model are under way, one inside a hook of the other
    fit_ended: bool = False  # the innermost fit came to its end; a finder of Lightning's may break one off
    quantised_reported: bool = False  # a message said that layers with quantised weights stay factored
    started: bool = False  # initialize_from_data was called, so a fit does not start from its own data
    values_follow: bool = False  # an adapter is loaded next, so no initial values are computed from weights
    ended: bool = False  # the adapters were taken out
    token: list[Any] = field(default_factory=list)  # marks the Kept of this record; a copied model has a copied token
    root: weakref.ref[nn.Module] | None = None  # the injected module; None in a copy of the record
    owner: Owner = field(default_factory=Owner)  # the thread that changes or saves the model; a copy has its own
    batch_norms: dict[int, BatchNormTensor] = field(default_factory=dict)  # by id of the tensor; empty in a copy

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("owner", "batch_norms", *OF_A_RUN)  # the class has their values of a new record
        return {name: value for name, value in vars(self).items() if name not in left_out} | {"root": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, owner=Owner(), batch_norms={})

    def begin(self, root: nn.Module) -> None:
        """Let a module hold the record as the injected module. In place.

        Raises:
            LoRAError: another thread has injected the module meanwhile.
        """
        if vars(root).setdefault(ATTRIBUTE, self) is not self:
            raise LoRAError(
                f"inject: another thread has injected this {type(root).__name__} meanwhile. One thread at a time "
                "changes a model: hold one threading.Lock of your own around such calls."
            )
        self.root = weakref.ref(root)

    def end(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Take the record and all that it keeps out of a root and its modules. In place."""
        self.ended = True
        for module in (root, self.holder()):
            if module is not None and vars(module).get(ATTRIBUTE) is self:
                delattr(module, ATTRIBUTE)
        for module in modules:
            vars(module).pop(KEPT, None)

    def holder(self) -> nn.Module | None:
        """Return the injected module, or None where it is gone or holds another record."""
        root = self.root() if self.root is not None else None
        return root if root is not None and vars(root).get(ATTRIBUTE) is self else None

    def kept(self, module: nn.Module) -> Kept | None:
        """Return what is kept of a module, or None where nothing is."""
        found: Kept | None = vars(module).get(KEPT)
        return found if found is not None and found["of"] is self.token else None

    def keep(self, module: nn.Module) -> Kept:
        """Return what is kept of a module for adding to it; an empty entry is made where there is none."""
        found = self.kept(module)
        if found is None:
            found = vars(module)[KEPT] = Kept(of=self.token)
        return found

    def initial(self, module: nn.Module) -> Mapping[str, torch.Tensor]:
        """Return the values from before training of a module's own tensors, by their names in the module."""
        kept = self.kept(module)
        return kept.get("initial", {}) if kept is not None else {}

    def keep_initial(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Keep values from before training of a module's own tensors; other tensors' values stay."""
        if values:
            self.keep(module).setdefault("initial", {}).update(values)

    def forget_initial(self, module: nn.Module) -> None:
        """Forget the values from before training of a module's own tensors."""
        kept = self.kept(module)
        if kept is not None and "initial" in kept:
            kept["initial"].clear()

    def marks(self, module: nn.Module) -> Mapping[str, Set[str]]:
        """Return the marks of a module's own parameters, by their names in the module."""
        kept = self.kept(module)
        return kept.get("marks", {}) if kept is not None else {}

    def keep_marks(self, module: nn.Module, marks: Mapping[str, Set[str]]) -> None:
        """Replace all marks of a module's own parameters."""
        if marks or self.marks(module):
            kept = self.keep(module).setdefault("marks", {})
            kept.clear()
            kept.update({leaf: set(each) for leaf, each in marks.items()})

    def add_trained(self, module: nn.Module, leaf: str, first: torch.Tensor | None, *marks: Mark) -> None:
        """Mark a module's own parameter as trained, and keep its value from before training, if that is known."""
        self.keep(module).setdefault("marks", {}).setdefault(leaf, set()).update(("trained", *marks))
        if first is not None:
            self.keep_initial(module, {leaf: copy_of(first)})

    def take_mark(self, module: nn.Module, leaf: str, mark: Mark) -> None:
        """Take a mark from a module's own parameter."""
        self.keep(module)["marks"][leaf].discard(mark)
