"""LoRA for PyTorch Lightning: one callback, merged evaluation at the plain model's speed, bit-exact restore."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LoRAConfig
from .errors import LoRAError
from .model.attached import attached, detach, scaled, set_strength
from .model.inject import disable_adapter, inject, merge_and_unload, unload
from .model.merging import is_merged, merge, merged, unmerge
from .model.param_groups import lora_param_groups
from .model.quantize import quantize_base
from .model.state_dict import adapter_state_dict, merged_state_dict
from .nn import variants as variants
from .nn.variant import Variant
from .report.statistics import adapter_stats
from .report.summary import summary
from .start.from_data import initialize_from_data

if TYPE_CHECKING:
    from .averaging import LoRAWeightAveraging
    from .callback import LoRACallback
    from .cli import LoRACLI as LoRACLI
    from .exchange.attach import attach
    from .exchange.combine import combine
    from .exchange.export import export_adapter
    from .exchange.merged_folder import save_merged
    from .exchange.merged_tensors import merged_tensors
    from .exchange.save_load import load_adapter, load_from_checkpoint, read_adapter, save_adapter, take_adapter
    from .monitor import LoRAMonitor
    from .report.figures import plot_adapter

__version__ = "0.1.0"
__all__ = [  # without LoRACLI, which needs the extra `cli`
    "LoRACallback",
    "LoRAConfig",
    "LoRAError",
    "LoRAMonitor",
    "LoRAWeightAveraging",
    "Variant",
    "adapter_state_dict",
    "adapter_stats",
    "attach",
    "attached",
    "combine",
    "detach",
    "disable_adapter",
    "export_adapter",
    "initialize_from_data",
    "inject",
    "is_merged",
    "load_adapter",
    "load_from_checkpoint",
    "lora_param_groups",
    "merge",
    "merge_and_unload",
    "merged",
    "merged_state_dict",
    "merged_tensors",
    "plot_adapter",
    "quantize_base",
    "read_adapter",
    "save_adapter",
    "save_merged",
    "scaled",
    "set_strength",
    "summary",
    "take_adapter",
    "unload",
    "unmerge",
]
LAZY = {  # imported at first use: lightning, the folders for files, and the extra `cli` (LoRACLI) take time
    "LoRACallback": ".callback",
    "LoRACLI": ".cli",
    "LoRAMonitor": ".monitor",
    "LoRAWeightAveraging": ".averaging",
    "attach": ".exchange.attach",
    "combine": ".exchange.combine",
    "export_adapter": ".exchange.export",
    "load_adapter": ".exchange.save_load",
    "load_from_checkpoint": ".exchange.save_load",
    "merged_tensors": ".exchange.merged_tensors",
    "plot_adapter": ".report.figures",
    "read_adapter": ".exchange.save_load",
    "save_adapter": ".exchange.save_load",
    "save_merged": ".exchange.merged_folder",
    "take_adapter": ".exchange.save_load",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
