"""LoRAMonitor, which logs how the adapter of a LightningModule trains: numbers at steps, pictures at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import names_near_misses
from .errors import LoRAError
from .model.adapted_model import find_model
from .trainer.by_module import ByModule
from .trainer.fabric import refuse_monitor
from .trainer.lightning_packages import become_callback, first_package
from .trainer.log_plots import log_plots, note_norms, will_draw
from .trainer.log_statistics import StatisticsLog

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.optim import Optimizer
else:
    Callback = first_package().Callback


@names_near_misses("LoRAMonitor")
class LoRAMonitor(Callback):
    """Log statistics of the adapter while it is trained, and pictures of it when fit ends.

    It works beside a LoRACallback, before or after it in the list, and without one on a model that inject was called
    on. Every logger gets the statistics of adapter_stats, by groups of layers, and what merging for evaluation took.
    Loggers that take figures, as TensorBoardLogger does, get pictures of the norms and singular values of the updates.

    Args:
        every_n_steps: optimizer steps from one log of statistics to the next; 0 logs none. Let it be a multiple of the
            Trainer's log_every_n_steps.
        plots: add the pictures of plot_adapter to loggers that take figures. Without matplotlib a line says so at fit
            start, and none are drawn.

    Raises:
        LoRAError: a value is not allowed; in fit, the Trainer has no logger, or the model no adapter.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callbacks = [LoRACallback(r=1), LoRAMonitor(every_n_steps=2, plots=False)]
        >>> options = {"log_every_n_steps": 2, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(max_steps=4, logger=L.pytorch.loggers.CSVLogger("."), callbacks=callbacks, **options)
        >>> trainer.fit(BoringModel())
        >>> print(*plot_adapter("lightning_logs/version_0"))
        statistics
    """

    def __init__(self, every_n_steps: int = 50, plots: bool = True) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 0:
            raise LoRAError(f"LoRAMonitor: every_n_steps must be a whole number from 0, but it is {every_n_steps!r}.")
        if not isinstance(plots, bool):
            raise LoRAError(f"LoRAMonitor: plots must be true or false, but it is {plots!r}.")
        self.every_n_steps = every_n_steps
        self.plots = plots
        self._statistics = StatisticsLog(every_n_steps)
        self._draws: ByModule[bool] = ByModule()  # whether there will be pictures at the end of a fit

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
        """Begin to measure; say what will not be logged or drawn."""
        handle = find_model(pl_module)
        if handle is None:
            raise LoRAError(
                f"LoRAMonitor: {type(pl_module).__name__} has no adapter. Put a LoRACallback into the Trainer's "
                "callbacks too, or call inject(model, LoRAConfig(...)) before fit."
            )
        self._statistics.begin(trainer, pl_module, handle.record)
        self._draws[pl_module] = self.plots and will_draw(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights that pictures compare the updates with, for the checkpoints of this fit."""
        if self._draws.get(pl_module):
            note_norms(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Let Lightning forget what it has written, so that it does not write it again."""
        self._statistics.take_back(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning forget the statistics that it has written, or the validation would show them as its metrics."""
        self._statistics.take_back(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log statistics at an Nth step, when gradients are summed over ranks and not clipped yet."""
        if self.every_n_steps:
            self._statistics.log(trainer, pl_module, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning forget what was logged at the last step."""
        self._statistics.take_back(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the adapter."""
        if self._draws.get(pl_module):
            log_plots(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the fit; Lightning calls no teardown after an exception."""
        self._end(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit."""
        if stage == "fit":
            self._end(pl_module)

    def on_after_setup(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be in Fabric's list: Fabric calls this hook, and none of a Trainer's."""
        refuse_monitor()

    on_after_optimizer_step = on_after_setup  # which Fabric calls where the model came from setup_module

    def _end(self, module: LightningModule) -> None:
        self._statistics.end(module)
        self._draws.pop(module, None)


become_callback(LoRAMonitor)
