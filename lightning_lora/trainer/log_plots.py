"""Pictures of the adapter in a run's loggers when fit ends: those of TensorBoard take figures."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import LoRAError, sentence
from ..notices import tell
from ..plot.from_model import updates_of_model
from ..plot.pictures import pictures_of

ADD = "add_figure"  # what a logger's experiment has that takes figures


def tell_of_no_logger(trainer: Any) -> None:
    """Say at fit start that no picture will be drawn, where no logger takes figures."""
    if trainer.is_global_zero and not _experiments(trainer):
        tell(
            "LoRACallback: log_plots: no logger of this Trainer takes figures, as TensorBoardLogger does; "
            "plot_adapter(model, output='adapter.png') draws them."
        )


def _experiments(trainer: Any) -> list[Any]:
    """Return what takes figures of each logger that has it."""
    return [logger.experiment for logger in trainer.loggers if hasattr(logger.experiment, ADD)]


def log_plots(trainer: Any, module: nn.Module) -> None:
    """Add the pictures of an adapted model to each logger that takes figures. Collective where it is sharded.

    They are the heat map of norms and the spectra, as `lora/norms` and `lora/spectra`, at the last step.
    """
    try:
        updates = updates_of_model(module)
    except LoRAError as error:  # on all ranks alike, and no reason to lose what a run has learnt
        rank_zero_warn(f"LoRACallback: log_plots: {sentence(error)}")
        return
    experiments = _experiments(trainer) if trainer.is_global_zero else []
    if not experiments:
        return
    from ..plot.canvas import to_figure

    for experiment in experiments:
        for name, picture in pictures_of(updates).items():
            experiment.add_figure(f"lora/{name}", to_figure(picture), trainer.global_step, close=False)
