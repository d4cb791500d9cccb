"""LoRAMonitor, which logs how the adapter of a LightningModule trains: numbers at steps, pictures at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from .distributed.deepspeed_optimizer import held_parameters, holds_copies
from .distributed.sharding import reshard_
from .errors import LoRAError, sentence
from .model.adapted_model import find_adapted, open_model
from .private.lightning import logged_step
from .report.figures import has_matplotlib
from .report.statistics import AdapterStats, layer_stats
from .report.updates import measure
from .trainer.lightning_packages import become_callback, first_package

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.optim import Optimizer
else:
    Callback = first_package().Callback


class LoRAMonitor(Callback):
    """Log statistics of the adapter while it is trained, and pictures of it when fit ends.

    It works with a LoRACallback, before or after it in the list, and without one on a model that inject was called
    on. Every logger gets the statistics of adapter_stats, by groups of layers. A TensorBoardLogger gets the pictures
    of plot_adapter.

    Args:
        every_n_steps: optimizer steps from one log of statistics to the next; 0 logs none.
        plots: add the pictures of plot_adapter to each TensorBoardLogger; they need matplotlib.

    Raises:
        LoRAError: a value is not allowed; in fit, the Trainer has no logger, or the model no adapter.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callbacks = [LoRACallback(r=1), LoRAMonitor(every_n_steps=2, plots=False)]
        >>> options = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(max_steps=4, logger=L.pytorch.loggers.CSVLogger("."), callbacks=callbacks, **options)
        >>> trainer.fit(BoringModel())
        >>> from pathlib import Path
        >>> columns = Path("lightning_logs/version_0/metrics.csv").read_text().split()[0].split(",")
        >>> print(*sorted(name for name in columns if name.startswith("lora/layer/")))
        lora/layer/cosine lora/layer/grad_A lora/layer/grad_B lora/layer/norm lora/layer/rank
    """

    def __init__(self, every_n_steps: int = 50, plots: bool = True) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 0:
            raise LoRAError(f"LoRAMonitor: every_n_steps must be a whole number from 0, but it is {every_n_steps!r}.")
        if not isinstance(plots, bool):
            raise LoRAError(f"LoRAMonitor: plots must be true or false, but it is {plots!r}.")
        self.every_n_steps = every_n_steps
        self.plots = plots
        self._forget()

    def _forget(self) -> None:
        self._last = AdapterStats({})  # snapshots of what was logged last, for cosines
        self._logged: dict[int, int] = {}  # the last step that was logged, by the id of the optimizer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(every_n_steps={self.every_n_steps}, plots={self.plots})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit without a logger, before anything else begins."""
        if stage == "fit" and not trainer.loggers:
            raise LoRAError(
                "LoRAMonitor: this Trainer has no logger, so there is nowhere to log to. Give it one, as "
                "Trainer(logger=CSVLogger('logs')), or leave LoRAMonitor out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without an adapter; forget an earlier fit."""
        if find_adapted(pl_module) is None:
            raise LoRAError(
                f"LoRAMonitor: {type(pl_module).__name__} has no adapter. Put a LoRACallback into the Trainer's "
                "callbacks too, or call inject(model, LoRAConfig(...)) before fit."
            )
        self._forget()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log statistics at an Nth step, when gradients are summed over ranks and not clipped yet.

        An optimizer that evaluates its closure several times calls this several times a step; the first call counts.
        """
        step = logged_step(trainer)
        if not self.every_n_steps or (step + 1) % self.every_n_steps or self._logged.get(id(optimizer)) == step:
            return
        self._logged[id(optimizer)] = step
        values = self._measure(pl_module, optimizer, is_one_of_several=len(trainer.optimizers) > 1)
        for logger in trainer.loggers if values else []:
            logger.log_metrics(values, step=step)

    def _measure(self, module: LightningModule, optimizer: Optimizer, *, is_one_of_several: bool) -> dict[str, float]:
        """Return the statistics of the layers that the optimizer is about to change, by name. Collective."""
        handle = open_model(module, "LoRAMonitor")
        layers = handle.layers
        if is_one_of_several:
            held = {id(parameter) for parameter in held_parameters(optimizer)}
            layers = {name: each for name, each in layers.items() if any(id(f) in held for f in each.trained_tensors())}
        if not layers:
            return {}
        reshard_(each for _, each in handle.modules)
        stats = layer_stats(layers, self._last.snapshots)
        self._last = AdapterStats(stats.groups, {**self._last.snapshots, **stats.snapshots})
        values = {
            f"lora/{group}/{name}": v for group, found in stats.groups.items() for name, v in found.to_dict().items()
        }
        if holds_copies(optimizer):  # DeepSpeed, which keeps sums of gradients elsewhere
            values = {name: value for name, value in values.items() if "/grad_" not in name}
        return values

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the adapter, and forget the fit."""
        self._forget()
        loggers = self._draws(trainer)
        if not loggers:
            return
        try:
            updates = measure(pl_module)
        except LoRAError as error:  # on all ranks alike; a run is not lost for want of a picture
            rank_zero_warn(f"LoRAMonitor: plots: {sentence(error)}")
            return
        if trainer.is_global_zero:
            from .report.pictures import figures_of  # imports matplotlib

            for name, figure in figures_of(updates).items():
                for logger in loggers:
                    logger.experiment.add_figure(f"lora/{name}", figure, trainer.global_step, close=False)

    def _draws(self, trainer: Trainer) -> list[Any]:
        """Return the loggers that get pictures. Every rank finds the same, as measuring is collective."""
        if not self.plots or not has_matplotlib():
            return []
        return [
            logger
            for logger in trainer.loggers
            if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)  # of either Lightning
        ]


become_callback(LoRAMonitor)
