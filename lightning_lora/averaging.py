"""LoRAWeightAveraging, Lightning's averages of weights for a model of which only the adapter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .distributed.sharding import copy_, copy_of, local, reshard_
from .errors import LoRAError
from .exchange.checkpoint_of_model import write_whole_state_
from .formats.lightning_checkpoint import CURRENT, by_canonical_names
from .model.adapted_model import AdaptedModel, find_adapted, open_model
from .model.live_state import open_state
from .names import canonical
from .trainer.lightning_packages import become_callback, first_package
from .trainer.run_state import injection_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging
else:  # Lightning before 2.6 has none
    EMAWeightAveraging = getattr(first_package().callbacks, "EMAWeightAveraging", first_package().Callback)

AVERAGING_STATE = "averaging_state"  # where Lightning keeps the number of averaged states in a checkpoint


class LoRAWeightAveraging(EMAWeightAveraging):
    """Average what is trained, and share what is frozen: Lightning's WeightAveraging with one base in memory.

    Lightning's own copies the whole LightningModule, averages the frozen base at each step, and cannot be used where a
    strategy divides weights. This one averages what a checkpoint of the adapter holds: adapters, modules_to_save,
    biases, persistent buffers. Otherwise it does what Lightning's do: validations and the end of fit have the average,
    checkpoints hold the average and, to resume, the current values.

    Put it after the LoRACallback in the Trainer's callbacks. It needs Lightning 2.6.

    Args:
        decay: of an exponential moving average; None is the mean of all states, each with the same weight.
        update_every_n_steps: optimizer steps from one update to the next; 0 for none.
        update_starting_at_step: the first step, counted from 0, after which there is an update.
        update_starting_at_epoch: the first epoch at whose end there is one more update; None for none.
        device: where the average is kept; None is where the trained tensors are.
        use_buffers: average buffers too. Otherwise the average has their last values.
        **kwargs: avg_fn or multi_avg_fn of torch.optim.swa_utils.AveragedModel, in place of decay.

    Raises:
        LoRAError: an option is not allowed; Lightning is too old; in fit, the model has no adapter.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callbacks = [LoRACallback(r=1, verbose=False), LoRAWeightAveraging(decay=0.9)]
        >>> options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(max_steps=2, limit_val_batches=1, callbacks=callbacks, **options)
        >>> trainer.fit(BoringModel())
        >>> trainer.save_checkpoint("average.ckpt")
        >>> print(*torch.load("average.ckpt", weights_only=True)["current_model_state"])
        layer.lora_A layer.lora_B
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        if EMAWeightAveraging.__name__ == "Callback":
            raise LoRAError(
                "LoRAWeightAveraging: this Lightning has no WeightAveraging to build on. Install lightning>=2.6."
            )
        if decay is not None and not 0 <= decay < 1:
            raise LoRAError(f"LoRAWeightAveraging: decay must be from 0 and below 1, but it is {decay!r}.")
        if decay is not None and kwargs:
            raise LoRAError(f"LoRAWeightAveraging: give decay or {next(iter(kwargs))}, not both.")
        super().__init__(
            device,
            use_buffers,
            decay=decay or 0.0,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )
        if decay is None:
            self._kwargs = kwargs  # in place of the function of an exponential average
        self._forget()

    def _forget(self) -> None:
        self._average_model = None
        self._handle: AdaptedModel | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._buffers: dict[str, nn.Module] = {}  # owners, because modules replace their buffers
        self._unfrozen = 0  # of the parameters that are recorded as trained
        self._loaded: dict[str, Any] = {}  # a checkpoint's average until training starts, by name
        self._is_exchanged = False  # the model holds the average now, and the average model the current values

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit. The average begins when training does: the model may not be built or divided yet."""
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without an adapter."""
        if find_adapted(pl_module) is None:
            raise LoRAError(
                f"LoRAWeightAveraging: {type(pl_module).__name__} has no adapter. Put a LoRACallback into the "
                "Trainer's callbacks before it, or use Lightning's own average."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average with the present values, or with a checkpoint's."""
        self._begin(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Average what was unfrozen since, too. LoRACallback has recorded it in an epoch's first batch."""
        injection = injection_of(pl_module)
        if injection is not None and injection.trained_count != self._unfrozen:
            self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after a step."""
        super().on_train_batch_end(trainer, self._trained(), outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the average after an epoch."""
        super().on_train_epoch_end(trainer, self._trained())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        if self._handle is not None:
            reshard_(module for _, module in self._handle.modules)
            super().on_train_end(trainer, self._trained())
            reshard_(module for _, module in self._handle.modules)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model, before LoRACallback merges at the first batch."""
        self._exchange()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the current values back, after LoRACallback has unmerged."""
        self._exchange()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the current values back where an exception or Ctrl-C ended a validation."""
        if self._is_exchanged:
            self._exchange()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average into state_dict, and keep the current values too. Collective."""
        if self._average_model is None or self._handle is None or injection_of(pl_module) is None:
            rank_zero_info("LoRAWeightAveraging: there is no average outside of a fit; the model is saved as it is.")
            return
        changing = {*open_state(self._handle).changing}
        self._exchange()
        try:
            state = trainer.strategy.lightning_module_state_dict()
            other = {  # copies, because the values of the model are exchanged back
                name: value.clone() if isinstance(value, torch.Tensor) and canonical(name) in changing else value
                for name, value in state.items()
            }
        finally:
            self._exchange()
        own = checkpoint["state_dict"]
        average, current = (own, other) if self._is_exchanged else (other, own)
        checkpoint.update({"state_dict": average, CURRENT: current})
        checkpoint[AVERAGING_STATE] = {"n_averaged": self._average_model.n_averaged.clone()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a fit, go on from the current values and keep the average for the start of training."""
        if trainer.state.fn != "fit":
            self._forget()  # the average is loaded into the model itself
        elif CURRENT in checkpoint and AVERAGING_STATE in checkpoint:
            handle = open_model(pl_module, "LoRAWeightAveraging")
            changing = {*open_state(handle).changing}
            average = by_canonical_names(checkpoint["state_dict"])
            self._loaded = {name: value for name, value in average.items() if name in changing}
            self._loaded |= checkpoint[AVERAGING_STATE]
            current = {**checkpoint, "state_dict": checkpoint[CURRENT]}
            write_whole_state_(handle, current, strict=pl_module.strict_loading)
        else:
            rank_zero_warn("LoRAWeightAveraging: the checkpoint holds no average, so it begins anew from its weights.")

    # --- what is averaged ---

    def _begin(self, module: nn.Module) -> None:
        """List what training changes. What is not averaged yet begins with its present values."""
        handle = open_model(module, "LoRAWeightAveraging")
        reshard_(each for _, each in handle.modules)
        known = self._named() if self._average_model is not None else {}
        count = self._average_model.n_averaged if self._average_model is not None else self._loaded.get("n_averaged")
        live, seen = open_state(handle), set[int]()
        self._handle, self._parameters, self._buffers = handle, {}, {}
        self._unfrozen = handle.injection.trained_count
        for name in live.changing:
            tensor = live.tensors[name]
            if tensor is None or id(tensor) in seen or tensor.dtype == torch.bool:  # which has no mean
                continue
            seen.add(id(tensor))  # a tied tensor is averaged once
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = live.owners[name]
        self._average_model = AveragedModel(
            self._trained(), device=self._device, use_buffers=self._use_buffers, **self._kwargs
        )
        if count is not None:
            self._average_model.n_averaged.copy_(count)
        for name, average in self._named().items():
            if name in known:
                average.copy_(known[name])
            elif name in self._loaded:
                part = copy_of(cast(torch.Tensor, live.tensors[name]))
                copy_(part, self._loaded[name])
                average.copy_(local(part))
        self._loaded = {}

    def _trained(self) -> Any:
        """Return what is averaged as a module of its own, in the model's memory: Lightning's methods ask for no more.

        Of divided tensors it has this rank's parts: an average is by element.
        """
        module = nn.Module()
        for n, parameter in enumerate(self._parameters.values()):
            module.register_parameter(str(n), nn.Parameter(local(parameter), requires_grad=False))
        for n, (name, owner) in enumerate(self._buffers.items(), start=len(self._parameters)):
            module.register_buffer(str(n), local(owner.get_buffer(name.rpartition(".")[2])))
        return module

    def _named(self) -> dict[str, torch.Tensor]:
        """Return the averaged tensors by the names of the model's."""
        module = cast(AveragedModel, self._average_model).module
        return dict(zip([*self._parameters, *self._buffers], [*module.parameters(), *module.buffers()], strict=True))

    def _exchange(self) -> None:
        """Exchange the values of the model and of the average. In place."""
        if self._handle is None:
            return
        modules = [module for _, module in self._handle.modules]
        reshard_(modules)  # what is written into a gathered weight would be lost
        self._swap_models(self._trained())
        self._is_exchanged = not self._is_exchanged
        reshard_(modules)


become_callback(LoRAWeightAveraging)
