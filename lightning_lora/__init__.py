"""LoRA for PyTorch Lightning: one callback, merged evaluation at the plain model's speed, bit-exact restore."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LoRAConfig as LoRAConfig
from .errors import LoRAError as LoRAError
from .export import save_merged as save_merged
from .inject import disable_adapter as disable_adapter
from .inject import inject as inject
from .inject import merge_and_unload as merge_and_unload
from .inject import unload as unload
from .merge import is_merged as is_merged
from .merge import merge as merge
from .merge import merged as merged
from .merge import unmerge as unmerge
from .state import adapter_state_dict as adapter_state_dict
from .state import merged_state_dict as merged_state_dict
from .transfer import load_adapter as load_adapter
from .transfer import load_from_checkpoint as load_from_checkpoint
from .transfer import save_adapter as save_adapter

if TYPE_CHECKING:
    from .callback import LoRACallback as LoRACallback
    from .cli import LoRACLI as LoRACLI

__version__ = "0.1.0"
LAZY = {
    "LoRACallback": ".callback",
    "LoRACLI": ".cli",
}  # these import lightning, LoRACLI also what the extra `cli` brings


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
