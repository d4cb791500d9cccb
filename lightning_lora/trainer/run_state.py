"""What LoRACallback asks for, and what it notes of a model while a Trainer runs. It is kept in the model's injection.

The injection carries it along and does not look into it: a copy of the model and another adapter that replaces this one
are asked for the same. What all of the package needs to know of a run are facts of the injection itself: fits,
in_training_batch and merged_to_evaluate. The hooks of every batch find the injection here without a walk of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..formats.lightning_checkpoint import Kind
from ..model.adapted_model import find_adapted
from ..model.injection import Injection
from ..names import INJECTION_ATTRIBUTE, MERGED_FOR_GOOD

ASKED = ("merged_eval", "save", "quantize", "dequantize")  # LoRACallback's options, which a copy of the model keeps
INSIDE = "lora_injection_inside"  # attribute of a module in a run: the injection of a module inside


@dataclass
class Run:
    """What is asked for, and noted. A copy of the model is in no run.

    Attributes:
        merged_eval: the option; None before a fit.
        save: the kind of Lightning checkpoint; None without a callback, which leaves checkpoints unfiltered.
        quantize: how layers that are built later are quantized.
        dequantize: the dtype of quantized weights in merged checkpoints.
        stays_unmerged: this evaluation runs unmerged, because merging found a value that is not finite.
        epoch_begins: no training batch of the epoch has begun.
        looked_at: ids of the fit's optimizers whose adapters were looked at for gradients.
        fit_ended: the innermost fit came to its end; a finder of Lightning's may break one off.
    """

    merged_eval: bool | None = None
    save: Kind | None = None
    quantize: str | None = None
    dequantize: Any = None
    stays_unmerged: bool = False
    epoch_begins: bool = False
    looked_at: frozenset[int] = frozenset()
    fit_ended: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ASKED}


def run_of(injection: Injection) -> Run:
    """Return what is asked for and noted of an injected model: the same object from the first call on."""
    if injection.run is None:
        injection.run = Run()
    run: Run = injection.run
    return run


def injection_of(module: nn.Module) -> Injection | None:
    """Return the injection of an injected LightningModule, without a walk from the second call on.

    None where nothing is injected, or a fit has merged the module for good.
    """
    if is_merged_for_good(module):
        return None
    injection: Injection | None = vars(module).get(INJECTION_ATTRIBUTE) or vars(module).get(INSIDE)
    if injection is None or "ended" in injection.marks:
        handle = find_adapted(module)
        injection = vars(module)[INSIDE] = handle.injection if handle is not None else None
    return injection


def forget_injection(module: nn.Module) -> None:
    """Remove what injection_of keeps in a module. In place."""
    vars(module).pop(INSIDE, None)


def is_merged_for_good(module: nn.Module) -> bool:
    """Return whether a fit merged the model for good, and nothing injected it since."""
    return MERGED_FOR_GOOD in vars(module)
