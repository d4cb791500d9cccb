"""What transformers' Conv1D changes in PEFT for other layers: attention's out_proj, and single parameters.

PEFT has one flag fan_in_fan_out for a folder. In the order of the model's modules it sets the flag to false at each
nn.Linear that it adapts and to true at each Conv1D. At nn.MultiheadAttention it leaves the flag as it is. So out_proj
after a Conv1D gets the transpose of s * B @ A (measured on 0.21.2). out_proj is square, and factors (B^T, A^T) make
that right again. target_parameters come last, and PEFT refuses them where the flag is true.

No file has the order of the modules. Adapter.after_conv1d keeps what a model told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..adapter.adapter import Adapter
from ..adapter.values import is_plain
from ..errors import LoRAError
from ..names import A, B
from ..nn.low_rank import ATTENTION_OUTPUT, CONV1D, LINEAR, SINGLE


def after_conv1d(kinds: Mapping[str, str], fan_in_fan_out: bool) -> frozenset[str]:
    """Return the names of the out_proj and single parameters that PEFT reaches while its fan_in_fan_out is true.

    Args:
        kinds: of all adapted layers and parameters, in the order of the model's modules.
        fan_in_fan_out: as adapter_config.json has it.
    """
    reached = set()
    for name, kind in kinds.items():
        if kind in (LINEAR, CONV1D):
            fan_in_fan_out = kind == CONV1D
        elif kind == ATTENTION_OUTPUT and fan_in_fan_out:
            reached.add(name)
    parameters = {name for name, kind in kinds.items() if kind in SINGLE}
    return frozenset(reached | parameters if fan_in_fan_out else reached)


def after_conv1d_in_all(adapters: Sequence[Adapter], kinds: Mapping[str, str]) -> frozenset[str] | None:
    """Return after_conv1d for an adapter that has the layers of several adapters.

    Args:
        adapters: the adapters.
        kinds: of all their layers and parameters, in any order.

    Returns:
        The names, or None where the order matters and none of the adapters tells it.
    """
    flag = CONV1D in kinds.values() or any(each.fan_in_fan_out for each in adapters)
    if not {LINEAR, CONV1D} <= set(kinds.values()) or not {ATTENTION_OUTPUT, *SINGLE} & set(kinds.values()):
        return after_conv1d(kinds, flag)
    whole = (each.after_conv1d for each in adapters if each.kinds.keys() == kinds.keys())
    return next(whole, None)


def turn(adapter: Adapter) -> Adapter:
    """Return the adapter with factors (B^T, A^T) of each out_proj that PEFT transposes. Calling it twice undoes it."""
    tensors = dict(adapter.tensors)
    for name in adapter.after_conv1d or ():
        if adapter.kinds.get(name) != ATTENTION_OUTPUT:
            continue
        a, b = f"{name}.{A}", f"{name}.{B}"
        if all(is_plain(tensors.get(key)) and tensors[key].dim() == 2 for key in (a, b)):
            tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()
    return replace(adapter, tensors=tensors)


def refuse_conv1d_before_parameters(adapter: Adapter) -> None:
    """Raise LoRAError where PEFT refuses single parameters after a Conv1D, or where the order of modules is unknown."""
    if adapter.after_conv1d is None:
        raise LoRAError(
            "save_adapter: adapters of different layers were combined, nn.Linear and transformers' Conv1D beside "
            "attention or single parameters. How PEFT reads the latter depends on the order of the model's modules: "
            "load the result onto its model (load_adapter) and call save_adapter."
        )
    parameters = sorted(adapter.after_conv1d.intersection(adapter.parameters))
    if parameters:
        raise LoRAError(
            f"save_adapter: {parameters[0]!r} is a parameter of a model whose last adapted layer is transformers' "
            "Conv1D; PEFT refuses target_parameters there. Leave one of the two out of the adapter, or save a "
            "Lightning checkpoint instead."
        )


def turn_as_in_model(adapter: Adapter, kinds: Mapping[str, str]) -> Adapter:
    """Return an adapter of PEFT's as PEFT applies it, given the kinds of the model's layers in the order of modules."""
    if not adapter.peft_outputs:
        return adapter
    return turn(replace(adapter, after_conv1d=after_conv1d(kinds, adapter.fan_in_fan_out), peft_outputs=False))


def turn_without_model(adapter: Adapter, where: object) -> Adapter:
    """Return an adapter of PEFT's as PEFT applies it, without a model.

    Raises:
        LoRAError: the result depends on the order of the model's modules.
    """
    if not adapter.peft_outputs:
        return adapter
    unknown = [name for name in adapter.module_layers if name not in adapter.kinds]
    outputs = [name for name, kind in adapter.kinds.items() if kind == ATTENTION_OUTPUT]
    if unknown and outputs and adapter.fan_in_fan_out:
        raise LoRAError(
            f"{where}: adapts {outputs[0]!r} of attention and, with fan_in_fan_out=true, {unknown[0]!r}. How peft "
            "applies the first depends on the order of the model's modules, which no file has. Load it in Python onto "
            "its model (load_adapter), and use save_adapter or save_merged."
        )
    return turn_as_in_model(adapter, adapter.kinds)
