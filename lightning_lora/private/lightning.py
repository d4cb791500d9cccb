"""Lightning's private parts, the same in 2.4 to 2.6. For none of them is a public way, or an issue about one, known."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

SET_UP_FSDP = "_setup_model"  # FSDPStrategy's method that wraps a model. Without it `patch` is an error with a remedy
SET_UP_DEEPSPEED = "_setup_model_and_optimizer"  # DeepSpeedStrategy's method that builds its optimizer; as above


# --- a run ---


def trainer_of(module: Any) -> Any:
    """Return the Trainer that a LightningModule is in, or None. Lightning's public `trainer` raises outside of one."""
    return getattr(module, "_trainer", None)


def checkpoint_of(trainer: Any) -> str | os.PathLike[str] | None:
    """Return the path of the checkpoint that a Trainer in setup is about to load, for "best" and the like too.

    Lightning keeps it in an argument of Trainer._run, which calls setup, so it is found in that call's frame.
    trainer.ckpt_path is set when setup is over, and until then it is that of the run before. Without `_run` no path is
    found: options that were left out have their defaults, and loading the checkpoint names those that differ.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
    return None


def logged_step(trainer: Any) -> int:
    """Return the step under which Lightning's own monitors log. Without the name the number of optimizer steps.

    They differ where several optimizers step in one batch.
    """
    step: int = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return step


def starts_processes(trainer: Any) -> bool:
    """Return whether the strategy starts processes for the fit, of which the main process gets only a state dict.

    Without the class the main process would stay without adapters, and nothing would say so: Lightning loads the
    weights there with strict=False. tests/project/test_private_parts.py fails if the class goes.
    """
    return any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(trainer.strategy.launcher).__mro__)


def is_stand_in(optimizer: Any) -> bool:
    """Return whether Lightning made this optimizer because configure_optimizers returned None.

    Without the class such a fit, which trains nothing, is an error that says so.
    """
    return type(optimizer).__name__ == "_MockOptimizer"


def is_tensor_parallel(strategy: Any) -> bool:
    """Return whether a ModelParallelStrategy splits layers. Without the name quantized layers are refused under it."""
    return getattr(strategy, "_tensor_parallel_size", None) != 1


def add_hyperparameters(module: Any, options: Mapping[str, Any]) -> None:
    """Add options to the hyper-parameters that a LightningModule's loggers get, and not to its checkpoints. In place.

    Lightning gives `hparams_initial` to the loggers in one call, right after the hooks of fit start, and puts `hparams`
    into checkpoints. A call of our own would come too late: TensorBoard compares runs by the first call. Without the
    names a warning says that the options are not logged.
    """
    if not hasattr(module, "_log_hyperparams"):
        rank_zero_warn("LoRACallback: the options are not logged; this version of Lightning is not known here.")
        return
    initial = module.hparams_initial if module._log_hyperparams else {}
    if isinstance(initial, dict):  # Lightning's own, a copy; a config of omegaconf may refuse new keys
        initial.update(options)
    else:
        initial = {**initial, **options}
    module._hparams_initial = initial
    module._log_hyperparams = True


# --- the training batches, read before training without using one of them up ---


def can_read_batches(trainer: Any, module: Any) -> bool:
    """Return whether training batches can be read twice. Not in a version of Lightning that lacks the names."""
    loops = trainer.fit_loop
    combined: Any = getattr(loops, "_combined_loader", None)
    if (
        not hasattr(combined, "_mode")
        or not hasattr(loops, "_data_fetcher")
        or not hasattr(loops.epoch_loop, "_build_kwargs")
        or not hasattr(module, "_on_before_batch_transfer")
    ):
        return False
    if type(loops._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":  # training_step takes the iterator itself
        return False
    return not any(isinstance(loader, Iterator) for loader in combined.flattened)


def batches_again(trainer: Any) -> Any:
    """Return a CombinedLoader over the Trainer's training loaders that begins anew, where can_read_batches."""
    combined = trainer.fit_loop._combined_loader
    again = type(combined)(combined.iterables, combined._mode)
    again.flattened = [_with_own_workers(loader) for loader in again.flattened]
    return again


def _with_own_workers(loader: Any) -> Any:
    """Return a loader without the iterator that persistent workers keep: the Trainer goes on with that one."""
    if getattr(loader, "_iterator", None) is None:  # torch's DataLoader; without the name nothing is kept
        return loader
    own = copy.copy(loader)
    own._iterator = None
    return own


def on_device(trainer: Any, module: Any, batch: Any) -> Any:
    """Return a batch as training_step gets it: converted, through the hooks of transfer, and moved."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def arguments_of_training_step(trainer: Any, batch: Any) -> tuple[Any, ...]:
    """Return what training_step takes: the batch, and its number where it asks for one."""
    return tuple(trainer.fit_loop.epoch_loop._build_kwargs({}, batch, 0).values())
