"""What LoRACallback asks for, and what it notes of a model while a Trainer runs. It is kept in the model's injection.

The injection carries it along and does not look into it: a copy of the model and another adapter that replaces this one
are asked for the same. What all of the package needs to know of a run are facts of the injection itself: fits,
in_training_batch and merged_to_evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats.lightning_checkpoint import Kind
from ..model.injection import Injection

ASKED = ("merged_eval", "save", "quantize", "dequantize")  # LoRACallback's options, which a copy of the model keeps


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
