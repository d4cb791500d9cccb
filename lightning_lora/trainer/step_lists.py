"""What the hooks of every batch need of a model, listed once, so that no batch walks the tree."""

from __future__ import annotations

from torch import nn

from ..distributed.sharding import reshard_
from ..model.injection import Injection, find_injection, record_trainable
from ..model.named_state import base_parameters
from ..names import ATTRIBUTE
from ..nn.lora_layer import AdaptedWeights, adapted_layers


class StepLists:
    """List the layers and the frozen parameters of one model, injected or not any more.

    Attributes:
        layers, states: the adapted layers, and what each carries.
        frozen: base parameters that were never trainable.
        trained_a_batch: a training batch has ended since.
        kept_in_eval: layers with dropout that are in eval mode while the model trains; None until that is noted.
    """

    def __init__(self, model: nn.Module) -> None:
        injected = find_injection(model)
        self.model = model
        self.root = injected.root if injected else model
        self.record: Injection | None = injected.record if injected else None
        self.layers = list(adapted_layers(model).values())
        self.states = [layer.lora for layer in self.layers]
        self.kept_in_eval: list[AdaptedWeights] | None = None
        self.trained_a_batch = False
        self.frozen = self._list_frozen()

    def is_current(self) -> bool:
        """Tell whether the model is still injected as it was when it was listed."""
        return vars(self.root).get(ATTRIBUTE) is self.record

    def is_merged(self) -> bool:
        """Tell whether merge was called and not undone."""
        return any(state.merged for state in self.states)

    def override_dropout(self, dropping: bool | None) -> None:
        """Let dropout of layers that are kept in eval mode act, or follow their own mode again (None)."""
        if dropping and self.kept_in_eval is None:
            with_dropout = (layer for layer in self.layers if layer.lora.spec.dropout)
            self.kept_in_eval = [layer for layer in with_dropout if not layer.lora_holder.training]
        for layer in self.kept_in_eval or ():
            layer.lora.dropout_override = dropping

    def record_trainable(self) -> None:
        """Record the initial value of every base parameter that has become trainable."""
        if any(parameter.requires_grad for parameter in self.frozen):
            record_trainable(self.model)
            self.frozen = self._list_frozen()

    def _list_frozen(self) -> list[nn.Parameter]:
        reshard_(self.model.modules())
        if self.record is None:
            return []
        return [p for name, p in base_parameters(self.root).items() if name not in self.record.trained]
