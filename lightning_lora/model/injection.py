"""The record of an injection: what a model remembers of it.

There is one record a model. The injected module and each adapted layer hold it, so that it is found from any module
that holds the layers: the injected one, one around it, the network inside, or a new module around the same network.

What is remembered of one module or tensor lies in that module, see Kept. So it goes where the module goes, under any
name; a copy of the model has its own, and a module that is built anew has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import ATTRIBUTE, KEPT
from ..nn.writer import Writer

ALL_OPTIONS = frozenset(option.name for option in fields(LoRAConfig))

# Of a base parameter: it was ever trainable; it became so after injection, and not by the options; it is saved because
# it was resized before injection.
Mark = Literal["trained", "unfrozen", "resized"]


class Kept(TypedDict, total=False):
    """What the record keeps of one module and of its own tensors, by their names in the module.

    These are plain types, so that a plain module which is pickled by itself needs no class of this package. There is no
    entry without content: a large model has thousands of modules.
    """

    of: list[Any]  # the record's token; one of a module that was copied by itself is another's, and means nothing
    requires_grad: dict[str, bool]  # of base parameters, before injection
    initial: dict[str, torch.Tensor]  # values from before training of trained base parameters and persistent buffers
    marks: dict[str, set[str]]  # of base parameters: each a Mark
    layers: dict[str, str]  # adapted layers inside: by name in this module, the name at injection
    left_out: str  # why "all-linear" leaves this layer out
    scope: bool  # whether the names of biases and whole modules in the options mean those in this module alone


class Owner(NamedTuple):
    """The module that a tensor was seen in: what is kept of it, and the tensor's name there."""

    tensor: torch.Tensor  # no weak reference: torch refuses to swap a tensor that has one
    kept: Kept
    leaf: str


class MergeCost(NamedTuple):
    """What a merge took: seconds on this rank, and the share of the adapter that rounding to 16 bits lost, if any."""

    seconds: float
    rounding: float | None


@dataclass
class Injection:
    """The record of one injection."""

    config: LoRAConfig
    merge_weights: bool = False  # eval() merges and train() unmerges
    given: frozenset[str] = ALL_OPTIONS  # the options that the user gave; the others are at their defaults
    layers: list[str] = field(default_factory=list)  # names that the adapted layers had in the injected module
    merged_eval: bool | None = None  # the callback's, or None without one
    save: Any = None  # the kind of Lightning checkpoint, or None for an unfiltered one
    lr_ratio: float | None = None  # of LoRA+, for an optimizer that LightningCLI makes
    dequantize: Any = None  # the dtype of quantised weights in merged checkpoints
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of the base at fit start, by LightningModule's names
    origin: dict[str, str] = field(default_factory=dict)  # what a loaded adapter says of its base, see Adapter
    validated: bool = False  # all layers were there, and each entry of the options names something
    seed: str = ""  # what adapters are drawn from, or "" for the random stream of the moment
    training_checked: bool = False  # training has begun, and what it does not reach was warned of
    checkpointing_off_reported: bool = False  # that gradient checkpointing does nothing in eval mode was said
    quantised_reported: bool = False  # that layers with quantised weights stay factored was said
    measures_rounding: bool = False  # each merge measures what rounding to 16 bits costs, not the first alone
    rounding: float | None = None  # what it cost when it was measured last, as MergeFidelity
    last_merge: MergeCost | None = None  # of an evaluation of this fit, as LoRACallback measured it
    started: bool = False  # initialize_from_data was called, so that a fit does not start from its own data
    values_follow: bool = False  # an adapter is loaded next, so that nothing is computed from weights for it
    passed_over: str = ""  # what "all-linear" left alone beside these: its share, and kinds of weights with theirs
    passes_over_nearly_all: bool = False  # which is to be warned of once
    ended: bool = False  # the adapters were taken out
    token: list[Any] = field(default_factory=list)  # tells this record's Kept from another's, also in a copy
    root: weakref.ref[nn.Module] | None = None  # the injected module; a copy of the record does not have it
    writer: Writer = field(default_factory=Writer)  # which thread changes the model; a copy has its own
    owners: dict[int, Owner] = field(default_factory=dict)  # of a BatchNorm's tensors; a copy has none yet

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name not in ("writer", "owners")}
        return kept | {"root": None, "measures_rounding": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, writer=Writer(), owners={})

    def begin(self, root: nn.Module) -> None:
        """Let a module hold the record as the injected one.

        Raises:
            LoRAError: it has got another one meanwhile, from another thread.
        """
        if vars(root).setdefault(ATTRIBUTE, self) is not self:
            raise LoRAError(
                f"inject: another thread has injected this {type(root).__name__} meanwhile. One thread at a time "
                "changes a model: hold one threading.Lock of your own around such calls."
            )
        self.root = weakref.ref(root)

    def end(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Forget everything: the adapters were taken out of a root with these modules."""
        self.ended = True
        for module in (root, self.holder()):
            if module is not None and vars(module).get(ATTRIBUTE) is self:
                delattr(module, ATTRIBUTE)
        for module in modules:
            vars(module).pop(KEPT, None)

    def holder(self) -> nn.Module | None:
        """Return the module that holds the record as the injected one, while it lives."""
        root = self.root() if self.root is not None else None
        return root if root is not None and vars(root).get(ATTRIBUTE) is self else None

    def kept(self, module: nn.Module) -> Kept | None:
        """Return what is kept of a module, or None for nothing."""
        found: Kept | None = vars(module).get(KEPT)
        return found if found is not None and found["of"] is self.token else None

    def keep(self, module: nn.Module) -> Kept:
        """Return what is kept of a module, to be added to."""
        found = self.kept(module)
        if found is None:
            found = vars(module)[KEPT] = Kept(of=self.token)
        return found

    def initial(self, module: nn.Module) -> Mapping[str, torch.Tensor]:
        """Return the values from before training of a module's own tensors, by their names in it."""
        kept = self.kept(module)
        return kept.get("initial", {}) if kept is not None else {}

    def keep_initial(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Keep values from before training of a module's own tensors, beside those that are kept."""
        if values:
            self.keep(module).setdefault("initial", {}).update(values)

    def forget_initial(self, module: nn.Module) -> None:
        """Forget the values from before training of a module's own tensors."""
        kept = self.kept(module)
        if kept is not None and "initial" in kept:
            kept["initial"].clear()

    def marks(self, module: nn.Module) -> Mapping[str, Set[str]]:
        """Return the marks of a module's own parameters, by their names in it."""
        kept = self.kept(module)
        return kept.get("marks", {}) if kept is not None else {}

    def keep_marks(self, module: nn.Module, marks: Mapping[str, Set[str]]) -> None:
        """Let a module's own parameters have these marks, and no others."""
        if marks or self.marks(module):
            kept = self.keep(module).setdefault("marks", {})
            kept.clear()
            kept.update({leaf: set(each) for leaf, each in marks.items()})

    def add_trained(self, module: nn.Module, leaf: str, parameter: torch.Tensor, *marks: Mark) -> None:
        """Keep a module's own parameter as one that is trained, with its present value as the one from before."""
        self.keep(module).setdefault("marks", {}).setdefault(leaf, set()).update(("trained", *marks))
        self.keep_initial(module, {leaf: parameter.detach().clone()})
