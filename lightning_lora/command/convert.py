"""`lightning-lora export` and `import`: write any adapter as a PEFT folder, or as a Lightning checkpoint."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..exchange.export import export_adapter
from ..exchange.take import copied
from ..files.atomic import new_file
from ..files.paths import PathLike
from ..files.torch_archive import write_torch_file
from ..formats.lightning_checkpoint import LIGHTNING_VERSION, checkpoint_metadata
from ..formats.peft_stacks import refuse_without_model
from ..formats.sources import adapter_with_options
from ..names import META
from .output import ADAPTER_CHECKPOINT, ADAPTER_FOLDER, check_output


def to_peft(
    source: PathLike,
    target: PathLike,
    lora_alpha: float | None = None,
    *,
    plain: bool = False,
    overwrite: bool = False,
) -> Adapter:
    """Write any adapter as a PEFT folder and return what was written. Other files in a replaced folder stay.

    Raises:
        LoRAError: the adapter cannot be read, PEFT or the plain form cannot express it, or the target is refused.
    """
    check_output("export", ADAPTER_FOLDER, target, [source], overwrite)
    return export_adapter(source, target, plain=plain, lora_alpha=lora_alpha)


def to_lightning(
    source: PathLike, target: PathLike, lora_alpha: float | None = None, *, overwrite: bool = False
) -> Adapter:
    """Write any adapter as a Lightning checkpoint of the kind "adapter", and return the adapter.

    The checkpoint has the names of the network. Loading finds the attribute of a LightningModule that holds the
    network.

    Raises:
        LoRAError: the adapter cannot be read or needs its model to be understood, or the target is refused.
    """
    if Path(target).suffix != ".ckpt":
        raise LoRAError(f"import: {target} is to be a Lightning checkpoint; its name must end in '.ckpt'.")
    check_output("import", ADAPTER_CHECKPOINT, target, [source], overwrite)
    adapter = adapter_with_options(source, lora_alpha)
    refuse_without_model(adapter, f"import: {source}")
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        LIGHTNING_VERSION: version("lightning"),
        "state_dict": copied(adapter).tensors,
        META: checkpoint_metadata("adapter", adapter),
    }
    with new_file(target) as file:
        write_torch_file(file, checkpoint, sum(tensor.nbytes for tensor in adapter.tensors.values()))
    return adapter
