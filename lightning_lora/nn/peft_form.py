"""How a variant's adapters look in PEFT's files: names and shapes of tensors, and options, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

Config = Any  # a LoRAConfig
Place = Any  # a Place of nn/variant.py, which imports this file
Stored = Mapping[str, torch.Tensor]  # tensors of one layer's adapter, by leaf name


class PeftForm:
    """The form of a variant in PEFT's files. By default its tensors and options are the same there.

    Attributes:
        peft_type: the value in PEFT's adapter_config.json, or "" for a variant that PEFT does not have. Subclasses do
            not inherit it.
        peft_leaves: our leaf names by the end of PEFT's tensor name after the layer's name, such as "lora_A.weight".
        peft_attention: PEFT adapts attention with the variant.
        peft_fields: options that PEFT's config of the variant has under the same name; empty for a peft.LoraConfig.
        peft_names: the names of other options in PEFT's config of the variant, by ours.
    """

    peft_type: ClassVar[str] = ""
    peft_leaves: ClassVar[Mapping[str, str]] = {}
    peft_attention: ClassVar[bool] = True
    peft_fields: ClassVar[Sequence[str]] = ()
    peft_names: ClassVar[Mapping[str, str]] = {}

    def peft_leaf(self, leaf: str, kind: str) -> str:
        """Return the end of PEFT's name for a tensor of a layer of this kind; by default the first in peft_leaves."""
        return next(theirs for theirs, ours in self.peft_leaves.items() if ours == leaf)

    def to_peft(self, stored: Stored, place: Place) -> dict[str, torch.Tensor]:
        """Return a layer's tensors with PEFT's values and shapes, by our leaf names.

        Leave out tensors that PEFT does not store.

        Args:
            stored: by leaf name, detached.
            place: the layer. Its kind is "" and its shapes are empty if they are not known.
        """
        return dict(stored)

    def from_peft(self, found: Stored, place: Place) -> dict[str, torch.Tensor]:
        """Undo to_peft: return a layer's tensors by leaf name.

        Raises:
            LoRAError: the tensors do not have the form that to_peft gives them.
        """
        return dict(found)

    def config_in_peft(self, config: Config) -> Config:
        """Return the options for the tensors of to_peft, which may have another rank. The scalings must stay."""
        return config

    def options_to_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of adapter_config.json without peft_type, from those of an equivalent peft.LoraConfig.

        Raises:
            ValueError: PEFT's config of the variant cannot express an option. The text names it, as part of a sentence.
        """
        if not self.peft_fields:
            return dict(options)
        same = {name: options.get(name) for name in self.peft_fields}
        return same | {theirs: options[ours] for ours, theirs in self.peft_names.items()}

    def options_from_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Undo options_to_peft: return the fields of an equivalent peft.LoraConfig.

        Raises:
            ValueError: the variant cannot do what a field asks for. The text names it, as part of a sentence.
        """
        ours = {theirs: ours for ours, theirs in self.peft_names.items()}
        return {ours.get(name, name): value for name, value in options.items()}
