"""Lists of layers and parameters for the hooks of every batch, made once, so that no batch walks the model."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import nn

from ..distributed.sharding import reshard_
from ..model.adapted_model import AdaptedModel, Listing, find_model, open_model
from ..model.injection import Injection
from ..names import ATTRIBUTE
from ..nn.adapted_weights import AdaptedWeights
from .deepspeed_optimizer import holds_copies, warn_of_unfrozen


class StepLists:
    """The adapted layers and the frozen parameters of one model.

    Attributes:
        layers: the adapted layers.
        states: the state of each.
        frozen: base parameters that were never trainable.
        frozen_in: the frozen parameters that an optimizer holds, by its id, with the sizes of its groups at that time.
        trained_a_batch: a training batch has ended since the lists were made.
        stepped: how many parameters of optimizers that have stepped were known when untrained layers were looked for.
        kept_in_eval: layers with dropout that stay in eval mode while the model trains; None until they are listed.
    """

    def __init__(self, model: nn.Module) -> None:
        handle = find_model(model)
        # Whoever keeps the lists does not keep the model alive with them.
        self._model = weakref.ref(model)
        self._root = weakref.ref(handle.root if handle else model)
        self.record: Injection | None = handle.record if handle else None
        self.layers = list((handle or Listing(model)).layers.values())
        self.states = [layer.lora for layer in self.layers]
        self.kept_in_eval: list[AdaptedWeights] | None = None
        self.trained_a_batch, self.stepped = False, -1
        self._list_frozen(handle)

    @property
    def model(self) -> nn.Module:
        """The model, which lives as long as its hooks are called."""
        return cast(nn.Module, self._model())

    def is_current(self) -> bool:
        """Return whether the model is still injected as it was when the lists were made."""
        root = self._root()
        return root is not None and vars(root).get(ATTRIBUTE) is self.record

    def is_merged(self) -> bool:
        """Return whether merge was called and not undone."""
        return any(state.merged for state in self.states)

    def override_dropout(self, dropping: bool | None) -> None:
        """Let dropout act in layers that are kept in eval mode (True), not act (False), or follow their mode (None)."""
        if dropping and self.kept_in_eval is None:
            with_dropout = (layer for layer in self.layers if layer.lora.spec.dropout)
            self.kept_in_eval = [layer for layer in with_dropout if not layer.lora_holder.training]
        for layer in self.kept_in_eval or ():
            layer.lora.dropout_override = dropping

    def record_trainable(self, optimizer: Any) -> None:
        """Record the initial value of every base parameter that has become trainable, before an optimizer's step.

        Only parameters that the optimizer holds are looked at. The others keep their values, and to look at each
        parameter of a large model takes a millisecond.
        """
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        listed = self.frozen_in.get(id(optimizer))
        if listed is None or listed[0] != sizes:  # a callback such as BackboneFinetuning adds groups
            listed = self.frozen_in[id(optimizer)] = sizes, self._frozen_in(optimizer)
        if any(parameter.requires_grad for parameter in listed[1]):
            handle = open_model(self.model, "LoRACallback")
            handle.record_trainable()
            warn_of_unfrozen(optimizer, [parameter for parameter in listed[1] if parameter.requires_grad])
            self._list_frozen(handle)

    def _frozen_in(self, optimizer: Any) -> list[nn.Parameter]:
        """Return the frozen parameters that an optimizer holds, or all of them where it holds copies instead."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        holds_others = held - {id(parameter) for parameter in self.model.parameters()}
        others = bool(holds_others) or holds_copies(optimizer)
        return [parameter for parameter in self.frozen if others or id(parameter) in held]

    def _list_frozen(self, handle: AdaptedModel | None) -> None:
        self.frozen: list[nn.Parameter] = []
        if handle is not None:
            reshard_(module for _, module in handle.root_modules)
            trained = handle.marked("trained")
            self.frozen = [each.parameter for each in handle.base() if id(each.parameter) not in trained]
        self.frozen_in: dict[int, tuple[list[int], list[nn.Parameter]]] = {}
