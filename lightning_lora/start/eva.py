"""EVA: A starts as the principal components of a layer's inputs, and B as zero (arXiv:2410.07170).

Let X be all inputs of a layer as rows, less their mean, and X = U @ S @ V.T. A holds the first r columns of V. X comes
in batches, and of the earlier ones only S and V are kept (incremental PCA, Ross et al. 2008). PEFT does the same, but
ends with the batch after which the components change little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..distributed.flat import unsharded_shape
from ..distributed.sharding import copy_
from ..errors import LoRAError
from ..nn.adapted_weights import AdaptedWeights
from ..nn.random_stream import svd_lowrank
from .batches import Forward, Mask, check_finite, data_batches, from_first_rank

ITERATIONS, SEED = 4, 42  # of the decomposition, as in PEFT


def start_from_inputs(
    model: nn.Module,
    layers: Mapping[str, AdaptedWeights],
    batches: Iterable[Any],
    forward: Forward,
    mask: Mask,
    n: int,
) -> None:
    """Let A of each layer be the principal components of its inputs. In place. Collective, as initialize_from_data.

    Raises:
        LoRAError: there are no batches, a layer did not run or had fewer inputs than components, or its inputs are not
            finite.
    """
    sizes = {name: min(layer.lora.spec.r, unsharded_shape(layer.lora_A)[1]) for name, layer in layers.items()}
    found: dict[str, PrincipalComponents] = {}
    with torch.no_grad(), data_batches(model, batches, n) as ready, _first_inputs(layers) as seen:
        for batch in ready:
            seen.clear()
            forward(model, batch)
            _check_all_ran(layers, seen)
            found = found or _for_each_input(seen, sizes)
            keep = mask(batch)
            for components, name in {found[name]: name for name in seen}.items():
                components.add(_rows(seen[name], keep, name))
    for name, size in sizes.items():
        if found[name].count < size:
            raise LoRAError(
                f"initialize_from_data: {name!r} needs at least {size} inputs for its {size} components, but all "
                f"batches together have {found[name].count}; give more batches, or a smaller r."
            )
    for name, layer in layers.items():
        values = found[name].components[: sizes[name]]
        start = values.new_zeros(unsharded_shape(layer.lora_A))  # rows of A beyond the number of features stay zero
        start[: len(values)] = values
        copy_(layer.lora_A, from_first_rank(start).to(layer.lora_A))


class PrincipalComponents:
    """Principal components of rows that come in batches.

    Attributes:
        size: how many to find.
        components: V.T, (at most size, features), each row of length 1, the strongest first.
        strengths: S, one for each component.
        mean: (features,), of all rows; float64, on mps float32.
        count: the number of rows so far.
    """

    def __init__(self, size: int, features: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.size, self.count = size, 0
        self.components, self.strengths = torch.zeros(0, features), torch.zeros(0)
        self.mean = torch.zeros(features, dtype=dtype, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Update the components with rows (any number, features)."""
        if not len(rows):
            return
        rows, total = rows.float(), self.count + len(rows)
        mean = rows.mean(0, dtype=self.mean.dtype)
        matrix = rows - mean.float()
        if self.count:  # the first batch alone is decomposed in float32, as in PEFT
            shift = (self.count * len(rows) / total) ** 0.5 * (self.mean - mean)
            matrix = torch.cat([self.strengths[:, None] * self.components, matrix, shift[None]]).to(mean.dtype)
        _, strengths, vectors = svd_lowrank(matrix, min(2 * self.size, *matrix.shape), ITERATIONS, SEED)
        vectors = vectors.T[: self.size]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        self.components, self.strengths = vectors * largest.sign(), strengths[: self.size]  # signs as in PEFT
        self.mean, self.count = self.mean + (mean - self.mean) * (len(rows) / total), total


@contextmanager
def _first_inputs(layers: Mapping[str, AdaptedWeights]) -> Iterator[dict[str, torch.Tensor]]:
    """Note the first input of each layer inside, by name."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.setdefault(name, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.lora_holder.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            hooks.callback(hook.remove)
        yield seen


def _check_all_ran(layers: Mapping[str, AdaptedWeights], seen: Mapping[str, torch.Tensor]) -> None:
    idle = [name for name in layers if name not in seen]
    if idle:
        raise LoRAError(
            f"initialize_from_data: {idle[0]!r} did not run in the forward ({len(idle)} of {len(layers)} layers); "
            "leave it out with exclude_modules, or let the forward call it."
        )


def _for_each_input(seen: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, PrincipalComponents]:
    """Return empty components by layer; layers that got one tensor share one object, of the largest size."""
    sharing: dict[int, list[str]] = {}
    for name, value in seen.items():
        sharing.setdefault(id(value), []).append(name)
    found = {}
    for names in sharing.values():
        value = seen[names[0]]
        components = PrincipalComponents(max(sizes[name] for name in names), value.shape[-1], value.device)
        found.update(dict.fromkeys(names, components))
    return found


def _rows(value: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return a layer's inputs (..., features) as rows (tokens, features), only those where the mask is true.

    Raises:
        LoRAError: a value is not finite.
    """
    if mask is not None and value.shape[: mask.dim()] == mask.shape:
        value = value[mask.to(value.device)]
    check_finite(value, f"the inputs of {name!r}")
    return value.reshape(-1, value.shape[-1])
