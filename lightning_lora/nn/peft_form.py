"""How a variant's adapters look in PEFT's files: names, shapes and options, both ways. Each variant says its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

Config = Any  # a LoRAConfig; its file stands above this one
Place = Any  # of nn/variant.py, which stands above this one too
Stored = Mapping[str, torch.Tensor]  # tensors of one layer's adapter, by leaf name


class PeftForm:
    """The form of a variant in PEFT; unless a variant says another, its tensors and options are PEFT's too.

    Attributes:
        peft_type: of PEFT's adapter_config.json; "" for a variant that PEFT does not have. Not inherited.
        peft_leaves: our leaf names by how PEFT's names of them end, after the layer's name: "lora_A.weight".
        peft_shared: our leaf names of shared tensors by PEFT's, after "base_model.".
    """

    peft_type: ClassVar[str] = ""
    peft_leaves: ClassVar[Mapping[str, str]] = {}
    peft_shared: ClassVar[Mapping[str, str]] = {}

    def peft_leaf(self, leaf: str, kind: str) -> str:
        """Return how PEFT's name of a tensor ends, of a layer of this kind; the first in peft_leaves by default."""
        return next(theirs for theirs, ours in self.peft_leaves.items() if ours == leaf)

    def to_peft(self, stored: Stored, place: Place) -> dict[str, torch.Tensor]:
        """Return a layer's tensors with values and shapes as PEFT has them, by our leaf names.

        What PEFT does not store is left out. Shared tensors are among them, the same for each layer.

        Args:
            stored: by leaf name, detached.
            place: the layer; its kind is "" and its shapes are empty where they are not known.
        """
        return dict(stored)

    def from_peft(self, found: Stored, place: Place) -> dict[str, torch.Tensor]:
        """Undo to_peft.

        Raises:
            LoRAError: the tensors are not of that form.
        """
        return dict(found)

    def config_in_peft(self, config: Config) -> Config:
        """Return the options that go with what to_peft returns: another rank, say; scalings stay."""
        return config

    def options_to_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of adapter_config.json, but for peft_type, from those that a peft.LoraConfig would have.

        Raises:
            ValueError: PEFT's config of the variant cannot express an option; a part of a sentence says which.
        """
        return dict(options)

    def options_from_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that a peft.LoraConfig would have, from those of adapter_config.json; undo options_to_peft.

        Raises:
            ValueError: a field asks for what the variant does not do; a part of a sentence says which.
        """
        return dict(options)
