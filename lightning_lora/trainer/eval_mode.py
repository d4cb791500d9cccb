"""What eval mode means for adapters, said where Lightning warns of it."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

WARNS = "_warn_if_modules_in_eval_mode"  # of Lightning's fit loop; some versions have none


def explain_eval_mode(trainer: Any, module: nn.Module) -> None:
    """Say in one line, after the warning of Lightning that modules are in eval mode, what that means for adapters."""
    if hasattr(trainer.fit_loop, WARNS) and not all(part.training for part in module.modules()):
        rank_zero_info(
            "LoRACallback: adapters are trained in eval mode too, with their dropout. Eval mode, as from_pretrained "
            "leaves it, switches off the base's own dropout and updates of BatchNorm's statistics; for these call "
            "model.train() before fit."
        )
