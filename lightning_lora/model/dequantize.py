"""Turn a model's quantised weights into plain weights with the adapters merged, for files and for merge_and_unload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

import torch
from torch import nn

from ..distributed.rank_sync import RankSync
from ..distributed.sharding import from_local_like, local
from ..errors import LoRAError
from ..nn.adapted_weights import AdaptedWeights, NamedModules, adapter_of, layer_adapter
from ..nn.exact_merge import merged_weight
from ..nn.low_rank import HALF, MERGEABLE_DTYPES
from ..nn.nf4 import NF4Linear
from ..nn.quantised import BITSANDBYTES, dequantize, quantised_modules, quantised_parameters
from ..nn.rounding import tell_rounding
from ..nn.variant import Stored
from ..notices import tell

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MERGEABLE_DTYPES}


def dequantize_dtype(value: object, verb: str) -> torch.dtype | None:
    """Return the dtype that the option `dequantize` gives, as a dtype or by its name; None for None.

    Raises:
        LoRAError: the value is no such dtype. The message begins with the verb.
    """
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if value is None or dtype in MERGEABLE_DTYPES:
        return dtype  # type: ignore[return-value]
    raise LoRAError(f"{verb}: dequantize must be one of {', '.join(DTYPES)}, but it is {value!r}.")


def report_factored(layers: Iterable[AdaptedWeights]) -> None:
    """Log once a model how many layers stay factored because their weights are quantised."""
    quantised = [layer for layer in layers if layer.quantised()]
    reported = {id(layer.lora.injection) for layer in quantised if layer.lora.injection.quantised_reported}
    quantised = [layer for layer in quantised if id(layer.lora.injection) not in reported]
    for layer in quantised:
        layer.lora.injection.quantised_reported = True
    if quantised:
        kinds = ", ".join(sorted({layer.quantised() for layer in quantised}))
        tell(
            f"lightning_lora: {len(quantised)} layers have quantised weights ({kinds}) and stay factored, also in "
            "merged evaluation: rounding W' to quantised values again would lose much of the adapter."
        )


def quantised_weights(places: NamedModules) -> dict[str, nn.Module]:
    """Return the module of each quantised weight, by the weight's name in the model's state dict.

    Args:
        places: every module of the model, under each of its names.
    """
    return {
        f"{path}.{name}" if path else name: module
        for path, module in quantised_modules(places).items()
        for name in quantised_parameters(module)
    }


def plain_weight(
    module: nn.Module,
    name: str,
    dtype: torch.dtype,
    cost: list[float] | None = None,
    stored: Stored | None = None,
    run: Callable[[Callable[[], None]], object] = lambda merge: merge(),
) -> torch.Tensor:
    """Return a quantised parameter as a new plain tensor of its shape, with its adapter merged; rounded once.

    It is sharded like the parameter. Collective where the parameter or the adapter is sharded.

    Args:
        module: the owner of the parameter.
        name: the parameter's name in the module.
        dtype: of the result.
        cost: as of merge_weight_.
        stored: other values for the layer's stored tensors, by leaf name.
        run: runs the part that does not communicate. Where that fails on a rank, and `run` keeps the error for later,
            the result is without the adapter.

    Raises:
        NonFiniteError: W' is not finite, or beyond the dtype's range.
    """
    values = dequantize(module, name)
    adapter = adapter_of(module, name)
    if adapter is None:
        return values.to(dtype)
    blocks = adapter.crop_to_shard(adapter.update_blocks(stored), values)
    found = [local(values)]

    def merge() -> None:
        found[0] = merged_weight(found[0], blocks, adapter.lora.spec.scaling, dtype=dtype, cost=cost)

    run(merge)
    return from_local_like(found[0].to(dtype), values)


def plain_weights(places: NamedModules, dtype: torch.dtype) -> dict[nn.Module, torch.Tensor]:
    """Return a plain merged weight for each module with a quantised weight.

    Raises:
        NonFiniteError: W' is not finite, or beyond the dtype's range.
    """
    dequantizer, plain = Dequantizer(dtype), {}
    for name, module in quantised_weights(places).items():
        if module not in plain:
            plain[module] = dequantizer.weight(name, module)
    dequantizer.report()
    return plain


def replace_quantised_(modules: Iterable[nn.Module], plain: Mapping[nn.Module, torch.Tensor]) -> None:
    """Replace quantised weights by plain weights; layers of bitsandbytes and NF4Linear become nn.Linear. In place.

    Args:
        modules: all modules of the model.
        plain: the plain weights, see plain_weights.
    """
    layers = {module: _plain_layer(module, weight) for module, weight in plain.items()}
    for parent in modules:
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


def _plain_layer(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    parameter = nn.Parameter(weight, requires_grad=False)
    if not any(cls.__module__.startswith(BITSANDBYTES) for cls in type(module).__mro__):  # a tensor of torchao
        module.weight = parameter
        module.__class__ = nn.Linear if type(module) is NF4Linear else type(module)
        return module
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = parameter, cast(nn.Linear, module).bias
    return linear.train(module.training)


class Dequantizer:
    """Make plain weights one by one, and report the cost of rounding W' to their dtype, once for each layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.cost = dtype, [0.0, 0.0]  # see merge_weight_

    def weight(
        self, name: str, module: nn.Module, sync: RankSync | None = None, stored: Stored | None = None
    ) -> torch.Tensor:
        """Return the plain weight for a name of the state dict, with the module's adapter merged; see plain_weight.

        Args:
            name: of the weight.
            module: its owner.
            sync: keeps the error of a weight that cannot be merged, where the model is sharded; without it the error
                is raised at once.
            stored: as of plain_weight.
        """
        cost, adapter = None, layer_adapter(module)
        if adapter is not None and not adapter.lora.rounding_reported:
            cost, adapter.lora.rounding_reported = self.cost, True
        leaf = name.rpartition(".")[2]
        if sync is None:
            return plain_weight(module, leaf, self.dtype, cost, stored)
        run = partial(sync.run, f"merged weights: {name!r}")
        return plain_weight(module, leaf, self.dtype, cost, stored, run)

    def report(self) -> None:
        """Log the share of the adapter that rounding loses, for layers that were not reported earlier."""
        what = f"merged {str(self.dtype).removeprefix('torch.')} weights, dequantised"
        remedy = 'dequantize="float32" takes twice the space and loses next to nothing.'
        tell_rounding(what, self.cost, remedy if self.dtype in HALF else "", stacklevel=2)
