"""Attention beside transformers' Conv1D, which PEFT's files cannot hold.

PEFT has one flag fan_in_fan_out for a folder. In the order of the model's modules it sets the flag to false at each
nn.Linear that it adapts and to true at each Conv1D. At nn.MultiheadAttention it leaves the flag as it is. So out_proj
after a Conv1D gets the transpose of s * B @ A (measured on 0.21.2). target_parameters come last, and PEFT refuses them
where the flag is true. No file has the order of the modules, so such adapters are refused.
"""

from __future__ import annotations

from ..adapter.adapter import Adapter
from ..errors import LoRAError
from ..nn.low_rank import ATTENTION_OUTPUT, CONV1D

TURNS = "PEFT transposes the change of out_proj after such a layer, and no file has the order of the layers"


def refuse_to_write_beside_conv1d(adapter: Adapter) -> None:
    """Raise LoRAError where an adapter has attention or single parameters beside transformers' Conv1D."""
    if not _beside_conv1d(adapter):
        return
    outputs = adapter.of_kind(ATTENTION_OUTPUT)
    if outputs or adapter.parameters:
        first = (outputs or adapter.parameters)[0]
        what = "attention" if outputs else "a single parameter"
        raise LoRAError(
            f"save_adapter: {first!r} is {what} in a model with transformers' Conv1D, and PEFT has one "
            "fan_in_fan_out for both, so no file of PEFT holds the two. Save a Lightning checkpoint or merged "
            "weights instead (save_merged), or leave one of the two out of the adapter."
        )


def refuse_file_beside_conv1d(adapter: Adapter, where: object) -> None:
    """Raise LoRAError where a file has attention and says that a Conv1D is, or may be, beside it."""
    outputs = adapter.of_kind(ATTENTION_OUTPUT)
    if outputs and _beside_conv1d(adapter):
        raise LoRAError(
            f"{where}: adapts {outputs[0]!r} of attention with fan_in_fan_out=true, as for transformers' Conv1D. "
            f"{TURNS}. Merge it in PEFT (merge_and_unload) and load the merged weights."
        )


def refuse_conv1d_of_model(adapter: Adapter, conv1d: str | None, where: object) -> None:
    """Raise LoRAError where an adapter of PEFT's has attention, and a layer of its model is a Conv1D.

    Args:
        adapter: as it was read.
        conv1d: the name of a layer that is one, if any.
        where: for messages.
    """
    outputs = adapter.of_kind(ATTENTION_OUTPUT) if adapter.peft_version is not None else []
    if outputs and conv1d is not None:
        raise LoRAError(
            f"{where}: adapts {outputs[0]!r} of attention, and {conv1d!r}, which is transformers' Conv1D. {TURNS}. "
            "Merge it in PEFT (merge_and_unload) and load the merged weights."
        )


def _beside_conv1d(adapter: Adapter) -> bool:
    return adapter.fan_in_fan_out or bool(adapter.of_kind(CONV1D))
