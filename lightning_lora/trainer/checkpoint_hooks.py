"""Convert a Trainer's checkpoints in the patched hooks of the LightningModule.

Lightning calls the module's on_save_checkpoint last, also with save_weights_only=True, and its on_load_checkpoint
before the strict load. A callback's own hooks come too early, too late or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import nn

from ..errors import LoRAError
from ..exchange.checkpoint_of_model import convert_checkpoint, prepare_for_load
from ..formats.lightning_checkpoint import CURRENT, Kind, check_kind
from ..model.adapted_model import AdaptedModel, find_adapted
from ..model.patches import call_previous, patch
from ..names import META, names_factor
from ..private.lightning import trainer_of
from .run_state import run_of


def save_as(handle: AdaptedModel, kind: Kind, dequantize: Any = None) -> None:
    """Patch a LightningModule so that its checkpoints are of this kind, and those of every kind load.

    Args:
        handle: of the module.
        kind: of its checkpoints.
        dequantize: the dtype of plain weights in place of quantized ones in merged checkpoints.
    """
    check_kind(kind)
    run = run_of(handle.injection)
    run.save = kind
    run.dequantize = dequantize
    patch(handle.model, "on_save_checkpoint", _on_save_checkpoint)
    patch(handle.model, "on_load_checkpoint", _on_load_checkpoint)


def save_as_where_unpatched(module: nn.Module, kind: Kind, dequantize: Any = None) -> None:
    """Patch an injected LightningModule as save_as does, where that was not done: in the main process of a launcher."""
    handle = find_adapted(module)
    if handle is not None and run_of(handle.injection).save is None:
        save_as(handle, kind, dequantize)


def _on_save_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    call_previous(module, previous, "on_save_checkpoint", checkpoint)
    handle = find_adapted(module)
    run = None if handle is None else run_of(handle.injection)
    if run is not None and run.save is not None:
        convert_checkpoint(module, checkpoint, run.save, run.dequantize)


def _on_load_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    if find_adapted(module) is not None:
        trainer = trainer_of(module)
        _refuse_foreign_resume(module, checkpoint)
        prepare_for_load(module, checkpoint)
        fitting = trainer is None or trainer.state.fn == "fit"
        # Where WeightAveraging finds an average it loads the weights that are not averaged, even for a test of the best
        # checkpoint, whose metric was measured on the average.
        if META in checkpoint and CURRENT in checkpoint and not fitting:
            checkpoint[CURRENT] = checkpoint["state_dict"]
    call_previous(module, previous, "on_load_checkpoint", checkpoint)


def _refuse_foreign_resume(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume a fit from a checkpoint without an adapter: its optimizers hold other parameters.

    Raises:
        LoRAError: a fit is about to restore the optimizers of a training without adapters.
    """
    trainer = trainer_of(module)
    resuming = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
    optimizers = checkpoint.get("optimizer_states", True)  # an empty list leaves no optimizer to restore
    if not resuming or not optimizers or META in checkpoint or any(map(names_factor, checkpoint["state_dict"])):
        return
    name = type(module).__name__
    raise LoRAError(
        "LoRACallback: the checkpoint at ckpt_path holds no adapter, only the weights of a training without one, whose "
        "optimizers and progress an adapter cannot go on with. To train an adapter on these weights, load them first "
        f'and leave ckpt_path out: trainer.fit({name}.load_from_checkpoint("pretrained.ckpt"), ...). To resume that '
        "training, leave LoRACallback out."
    )
