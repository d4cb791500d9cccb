"""LoRAMonitor's pictures of the adapter, for loggers that take figures, as TensorBoard's do, when fit ends."""

from __future__ import annotations

import contextlib
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from ..errors import LoRAError, sentence
from ..notices import tell
from ..report.from_model import record_norms, updates_of_model
from ..report.pictures import has_matplotlib, pictures_of

ADD = "add_figure"  # the method of a logger's experiment that takes a figure


def will_draw(trainer: Any) -> bool:
    """Return at fit start whether pictures will be drawn at its end, the same on all ranks. Collective.

    Where none will be, the first rank says why. No run is stopped for want of pictures.
    """
    draws = False
    if trainer.is_global_zero and _experiments(trainer):
        draws = has_matplotlib()
        if not draws:
            tell("LoRAMonitor: plots: needs matplotlib; pip install matplotlib. This fit ends without pictures.")
    tell_of_no_logger(trainer)
    return bool(trainer.strategy.broadcast(draws))


def tell_of_no_logger(trainer: Any) -> None:
    """Say at fit start that no picture will be drawn, where no logger takes figures."""
    if trainer.is_global_zero and not _experiments(trainer):
        tell(
            "LoRAMonitor: plots: no logger of this Trainer takes figures, as TensorBoardLogger does; "
            "plot_adapter(model, output='adapter.png') draws them."
        )


def _experiments(trainer: Any) -> list[Any]:
    """Return the experiments of those loggers that take figures."""
    experiments = (getattr(logger, "experiment", None) for logger in trainer.loggers)
    return [experiment for experiment in experiments if hasattr(experiment, ADD)]


def note_norms(module: nn.Module) -> None:
    """Measure the adapted weights before training, so that the run's checkpoints give the same pictures. Collective."""
    with contextlib.suppress(LoRAError):  # log_plots will say it
        record_norms(module)


def log_plots(trainer: Any, module: nn.Module) -> None:
    """Add the pictures of an adapted model to each logger that takes figures. Collective where it is sharded.

    The heat map of norms is named `lora/norms` and the spectra `lora/spectra`, both at the last step.
    """
    try:
        updates = updates_of_model(module)
    except LoRAError as error:  # on all ranks alike; a run is not lost for want of a picture
        rank_zero_warn(f"LoRAMonitor: plots: {sentence(error)}")
        return
    experiments = _experiments(trainer) if trainer.is_global_zero else []
    if not experiments:
        return
    from ..report.canvas import to_figure

    for experiment in experiments:
        for name, picture in pictures_of(updates).items():
            experiment.add_figure(f"lora/{name}", to_figure(picture), trainer.global_step, close=False)
