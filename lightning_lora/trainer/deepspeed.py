"""DeepSpeedStrategy with ZeRO stages 1 to 3: every rank holds a part of the optimizer, at stage 3 also of the model.

DeepSpeed trains float32 copies of the trained parameters. In stages 1 and 2 these lie group by group one after the
other in a flat tensor, of which each rank keeps an equal part, and so do the states of the optimizer. At stage 3 each
rank keeps an equal slice of each flattened parameter (distributed/flat.py), and gathers a module's parameters for its
forward. DeepSpeed's own files depend on the number of ranks, so they are not written: a checkpoint is the file of one
device, see one_file.py.

DeepSpeed's classes are recognised by name and by attributes, so that it is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..distributed.deepspeed_optimizer import ORDER, float32_copies
from ..distributed.flat import note_unit
from ..errors import LoRAError
from ..model.adapted_model import find_adapted
from ..model.patches import call_previous, patch
from ..names import META, canonical
from ..nn.low_rank import HALF
from ..private.deepspeed import GatheredByZero, gathering_part, what_is_unknown
from ..private.lightning import SET_UP_DEEPSPEED

REMEDY = (
    "Use DeepSpeedStrategy(stage=2), ModelParallelStrategy with fully_shard (FSDP2) in configure_model, or "
    "strategy='ddp' where the base fits on one device."
)


# --- what cannot be right is refused in setup ---


def prepare_deepspeed(strategy: Any) -> None:
    """Patch how a DeepSpeedStrategy sets up its engine.

    Raises:
        LoRAError: its options cannot be used, or DeepSpeed is not installed. The message says what to do.
    """
    config = getattr(strategy, "config", None)
    for reason in _refused(config if isinstance(config, Mapping) else {}):
        raise LoRAError(f"LoRACallback: DeepSpeedStrategy cannot be used so: {reason}. {REMEDY}")
    if find_spec("deepspeed") is None:
        raise LoRAError(
            "LoRACallback: DeepSpeedStrategy needs DeepSpeed, which is not installed. Run pip install "
            "'lightning-lora[deepspeed]'."
        )
    patch(strategy, "init_deepspeed", _init_deepspeed)
    patch(strategy, SET_UP_DEEPSPEED, _set_up_optimizer)


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reason for each of DeepSpeed's options that cannot be used."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        yield f"its stage is {stage!r}, and 1, 2 and 3 are supported"
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            yield f"{name} to NVMe keeps in files what a checkpoint has to hold; device='cpu' is supported"
    for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            yield f"{name} (ZeRO++) sends rounded values, so what was merged is not restored exactly"
    if zero.get("round_robin_gradients"):
        yield "round_robin_gradients keeps states in another order than DeepSpeed's own functions read them in"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        yield "zero_hpz_partition_size (ZeRO++) keeps second copies of weights, which merging does not reach"
    if zero.get("mics_shard_size", -1) > 0:
        yield "mics_shard_size (MiCS) divides weights over groups of ranks in a way of its own"
    if zero.get("zenflow"):
        yield "zenflow keeps a part of the optimizer's states where a checkpoint does not find them"
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        yield "tensor_parallel.autotp_size splits layers after they were adapted"


# --- the engine is set up ---


def _init_deepspeed(strategy: Any, previous: Callable[..., Any] | None) -> None:
    """Tell modules who frees what the new engine gathers for them: the patched init_deepspeed."""
    call_previous(strategy, previous, "init_deepspeed")
    offload = gathering_part(strategy.deepspeed_engine.optimizer)
    if offload is not None:
        gathered = GatheredByZero(offload, strategy.lightning_module.parameters())
        for module in strategy.lightning_module.modules():
            note_unit(module, gathered)


def _set_up_optimizer(
    strategy: Any, previous: Callable[..., Any] | None, model: Any, optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Note the optimizer's groups, which DeepSpeed replaces by flat tensors: DeepSpeedStrategy's patched method."""
    order = [{**group, "params": list(group["params"])} for group in getattr(optimizer, "param_groups", ())]
    found = call_previous(strategy, previous, SET_UP_DEEPSPEED, model, optimizer, *args, **kwargs)
    if find_adapted(strategy.lightning_module) is not None:
        if unknown := what_is_unknown(found[1]):
            raise LoRAError(
                f"LoRACallback: DeepSpeed made {unknown}, whose states cannot be put together. Leave data_types and "
                "other optimizers' options out of DeepSpeed's config; or install a version of DeepSpeed from 0.16.9 "
                "to 0.19."
            )
        vars(found[1])[ORDER] = order
    return found


# --- checkpoints ---


def with_float32_values(module: nn.Module, checkpoint: Mapping[str, Any], optimizers: Iterable[Any]) -> Any:
    """Return a checkpoint with DeepSpeed's float32 copies in place of parameters in 16 bits. Collective.

    Other values, such as an average of the weights, stay.
    """
    copies = {key: value for optimizer in optimizers for key, value in float32_copies(optimizer).items()}
    if not copies or META not in checkpoint:
        return checkpoint
    merged = "adapter" in checkpoint[META]
    holder, key = (checkpoint[META], "adapter") if merged else (checkpoint, "state_dict")
    parameters = module.named_parameters(remove_duplicate=False)
    named = {canonical(name): copies[id(p)] for name, p in parameters if id(p) in copies}
    tensors = dict(holder[key])
    for name, value in holder[key].items():
        copy = named.get(canonical(name))
        if copy is not None and value.dtype in HALF and torch.equal(copy.to(value.dtype), value.cpu()):
            tensors[name] = copy
    holder = {**holder, key: tensors}
    return {**checkpoint, META: holder} if merged else holder
