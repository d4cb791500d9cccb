"""Write an adapter of any form as a PEFT folder, as it is or in the plain form that every server takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..adapter.adapter import Adapter
from ..files.paths import PathLike
from ..formats.peft_folder import write_folder
from ..formats.plain import served_form
from ..formats.sources import adapter_with_options

Sources = PathLike | Mapping[str, Any] | Adapter


def export_adapter(source: Sources, path: PathLike, *, plain: bool = False, lora_alpha: float | None = None) -> Adapter:
    """Write an adapter of any form as a PEFT folder with a model card, without a model.

    Of an adapter of a LightningModule, names in the folder are those of its network. PEFT loads it onto that:
    PeftModel.from_pretrained(module.net, path). Given the LightningModule, PEFT fails, or runs the base and only warns.

    Args:
        source: any form of adapter that load_adapter takes, such as the best checkpoint of a run.
        path: the folder. An adapter that is in it is replaced without asking; what else is in it stays.
        plain: write the form that every server and converter takes: one r, with zeros added to lower ranks,
            lora_alpha = r, the scale multiplied into B, one pair of float32 factors a layer, and neither patterns nor
            rsLoRA. The outputs stay, up to rounding.
        lora_alpha: for an adapter that does not store it, such as a file of loralib's.

    Returns:
        The adapter that was written.

    Raises:
        LoRAError: the adapter cannot be read, or PEFT or the plain form cannot express it. Nothing is written.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, lora_alpha=4, rank_pattern={"0": 1}))
        >>> export_adapter(take_adapter(model), "served", plain=True)
        Adapter(r=2, 2 layers, 52 values)
    """
    path_of_source = source if isinstance(source, (str, os.PathLike)) else None
    where = "" if path_of_source else "export_adapter"
    adapter = adapter_with_options(source, lora_alpha, where, verb="export_adapter")
    network = adapter.network
    if plain:
        adapter = served_form(adapter, path_of_source)
    write_folder(adapter, path, verb="export_adapter", plain=plain, network=network)
    return adapter
