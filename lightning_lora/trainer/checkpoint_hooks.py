"""Convert a Trainer's checkpoints in the patched hooks of the LightningModule.

Lightning calls the module's on_save_checkpoint last, also with save_weights_only=True, and its on_load_checkpoint
before the strict load. A callback's own hooks come too early, too late or not at all. From the processes of ddp_spawn,
ddp_fork and ddp_notebook the main process gets only a state dict. So what these processes recorded of the injection is
put into the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import nn

from ..errors import LoRAError
from ..exchange.checkpoint_of_model import convert_checkpoint, prepare_for_load
from ..formats.lightning_checkpoint import Kind, check_kind
from ..model.adapted_model import AdaptedModel, find_model, open_model
from ..model.patches import call_previous, patch
from ..model.quantise import call_that_quantises
from ..model.state_dict import EXTRA_ENTRIES
from ..names import ENTRY, META, names_factor
from .compatibility import launches
from .untrained import warn_of_untrained_in

# The key under which WeightAveraging keeps the weights that are not averaged. When it finds an average it loads them,
# even for a test of the best checkpoint, although that checkpoint's metric was measured on the averaged weights.
CURRENT = "current_model_state"


def save_as(handle: AdaptedModel, kind: Kind, dequantize: Any = None) -> None:
    """Patch a LightningModule so that its checkpoints are of this kind, and those of every kind load.

    Args:
        handle: of the module.
        kind: of its checkpoints.
        dequantize: the dtype of plain weights in place of quantised ones in merged checkpoints.
    """
    _patch_saving(handle, kind)
    handle.record.dequantize = dequantize
    patch(handle.model, "on_load_checkpoint", _on_load_checkpoint)


def save_as_where_unpatched(module: nn.Module, kind: Kind, dequantize: Any = None) -> None:
    """Patch an injected LightningModule as save_as does, where that was not done: in the main process of a launcher."""
    handle = find_model(module)
    if handle is not None and handle.record.save is None:
        save_as(handle, kind, dequantize)


def export_where_launched(trainer: Any, module: nn.Module) -> None:
    """Export the state of an injected LightningModule where a main process started this one."""
    if launches(trainer) and (handle := find_model(module)) is not None:
        export_state(handle)


def export_state(handle: AdaptedModel) -> None:
    """Put into the module's state dicts what the main process needs of the injection: this process is about to end."""
    handle.root.register_state_dict_post_hook(_export_to_state_dict)  # type: ignore[no-untyped-call]


def import_state(root: nn.Module, exported: dict[str, Any]) -> None:
    """Take over what another process exported. A LightningModule saves from now on the kind that it saved there."""
    handle = open_model(root, "LoRACallback")
    handle.take_over(exported["initial"], exported["trained"], exported["unfrozen"])
    handle.record.fingerprint = dict(exported["fingerprint"])
    if exported["save"] is not None and hasattr(root, "on_save_checkpoint"):
        _patch_saving(handle, exported["save"])


EXTRA_ENTRIES[ENTRY] = import_state


def _patch_saving(handle: AdaptedModel, kind: Kind) -> None:
    check_kind(kind)
    handle.record.save = kind
    patch(handle.model, "on_save_checkpoint", _on_save_checkpoint)


def _on_save_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    call_previous(module, previous, "on_save_checkpoint", checkpoint)
    injected = find_model(module)
    if injected is not None and injected.record.save is not None:
        convert_checkpoint(module, checkpoint, injected.record.save)


def _on_load_checkpoint(
    module: nn.Module, previous: Callable[..., Any] | None, checkpoint: MutableMapping[str, Any]
) -> None:
    if find_model(module) is not None:
        trainer = getattr(module, "_trainer", None)
        warn_of_untrained_in(trainer, module, loading=True)  # now, because loading hides what a finder has trained
        if "state_dict" in checkpoint:  # without it, the strategy has loaded and checked it already
            refuse_foreign_resume(module, checkpoint, checkpoint["state_dict"])
        prepare_for_load(module, checkpoint, call_for=call_that_quantises)
        fitting = trainer is None or trainer.state.fn == "fit"
        if META in checkpoint and CURRENT in checkpoint and not fitting:
            checkpoint[CURRENT] = checkpoint["state_dict"]
    call_previous(module, previous, "on_load_checkpoint", checkpoint)


def refuse_foreign_resume(module: nn.Module, checkpoint: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse to resume a fit from a checkpoint without an adapter: its optimizers hold other parameters.

    Args:
        module: the injected LightningModule.
        checkpoint: what the Trainer loaded.
        names: of the tensors in the checkpoint.

    Raises:
        LoRAError: a fit is about to restore the optimizers of a training without adapters.
    """
    trainer = getattr(module, "_trainer", None)
    resuming = trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running"
    optimizers = checkpoint.get("optimizer_states", True)  # an empty list leaves no optimizer to restore
    if not resuming or not optimizers or META in checkpoint or any(map(names_factor, names)):
        return
    name = type(module).__name__
    raise LoRAError(
        "LoRACallback: the checkpoint at ckpt_path holds no adapter, only the weights of a training without one, whose "
        "optimizers and progress an adapter cannot go on with. To train an adapter on these weights, load them first "
        f'and leave ckpt_path out: trainer.fit({name}.load_from_checkpoint("pretrained.ckpt"), ...). To resume that '
        "training, leave LoRACallback out."
    )


def _export_to_state_dict(root: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    handle = open_model(root, "LoRACallback")
    state[prefix + ENTRY] = {
        "save": handle.record.save,
        "fingerprint": handle.record.fingerprint,
        "initial": handle.initial(),
        "trained": sorted(handle.initial_of("trained")),
        "unfrozen": sorted(handle.initial_of("unfrozen")),
    }
