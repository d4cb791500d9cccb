"""EVA: A starts as the principal components of a layer's inputs, and B as zero (arXiv:2410.07170)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.flat import whole_shape
from ..distributed.sharding import copy_
from ..errors import LoRAError
from ..names import listed
from ..nn.adapted_weights import AdaptedWeights
from ..nn.random_stream import svd_lowrank
from ..progress import progress_bar
from .batches import Caller, Run, evaluating, from_first_rank, in_step

ITERATIONS, SEED = 4, 42  # of the decomposition, as in PEFT


def start_from_inputs(model: nn.Module, layers: Mapping[str, AdaptedWeights], run: Run) -> None:
    """Let A of each layer be the principal components of its inputs. In place. Collective, as initialize_from_data.

    Raises:
        LoRAError: see principal_components.
    """
    sizes = {name: min(layer.lora.spec.r, whole_shape(layer.lora_A)[1]) for name, layer in layers.items()}
    found = principal_components(model, layers, run, sizes, lambda components: sizes)
    for name, layer in layers.items():
        values = from_first_rank(found[name].components)[: sizes[name]]
        start = values.new_zeros(whole_shape(layer.lora_A))  # rows of A beyond the number of features stay zero
        start[: len(values)] = values
        copy_(layer.lora_A, start.to(layer.lora_A))


Found = Mapping[str, "PrincipalComponents"]  # by layer


def principal_components(
    model: nn.Module,
    layers: Mapping[str, AdaptedWeights],
    run: Run,
    sizes: Mapping[str, int],
    needed: Callable[[Found], Mapping[str, int]],
) -> dict[str, PrincipalComponents]:
    """Return the principal components of each layer's inputs; layers with equal inputs share one object.

    Args:
        model: holds the layers, and runs in eval mode.
        layers: by name.
        run: the batches, which are used until enough components have converged.
        sizes: how many components to find, by layer.
        needed: returns how many of the components found so far have to converge, by layer.

    Raises:
        LoRAError: there are no batches, a layer never ran or had fewer inputs than components, or its inputs are not
            finite.
    """
    inputs = _Inputs({name: layer.lora_holder for name, layer in layers.items() if name in sizes})
    found: dict[str, PrincipalComponents] = {}
    with evaluating(model), torch.no_grad(), progress_bar("initialising", len(layers)) as advance:
        shown = 0
        for batch in in_step(run.batches, lambda: bool(found) and not _unconverged(found, needed)):
            keep = run.mask(batch)
            with inputs.recorded(set(found and _unconverged(found, needed)) or set(layers), run.caller):
                run.forward(model, batch)
            if not found:
                found.update(_shared(inputs.seen, sizes, run.tau))
            recorded = {id(found[name]): name for name in inputs.seen}  # once where several share components
            for name in recorded.values():
                found[name].add(_rows(inputs.seen[name], keep, name, run.caller.verb))
            done = len(layers) - len(_unconverged(found, needed))
            advance(max(done - shown, 0))
            shown = max(done, shown)
    _check_found(found, run.caller)
    slow = _unconverged(found, needed)
    if slow:
        warnings.warn(
            f"lightning_lora: the components of {listed(slow)} ({len(slow)} of {len(layers)} layers) had not converged "
            f"when the batches ended; they are used as they are. {run.caller.slow}.",
            stacklevel=3,
        )
    return found


def _check_found(found: Found, caller: Caller) -> None:
    """Raise LoRAError where there was no batch, or a layer had fewer inputs than components."""
    if not found:
        raise LoRAError(f"{caller.verb}: there are no batches.")
    few = [name for name, components in found.items() if components.components is None]
    if few:
        each = found[few[0]]
        raise LoRAError(
            f"{caller.verb}: {few[0]!r} needs at least {each.size} inputs for its {each.size} components, but all "
            f"batches together have {sum(map(len, each.waiting))}; give more batches, or a smaller r."
        )


@dataclass
class PrincipalComponents:
    """Principal components of rows that come in batches: incremental PCA (Ross et al. 2008), the mean subtracted.

    Attributes:
        size: n, the number of components.
        tau: the cosine similarity to its value one batch earlier from which on a component has converged.
        components: (n, features) float32, each of length 1, the strongest first; None before there are n rows.
        explained: (n,) float64, the share of the variance that each component explains.
        converged: (n,) bool.
        strengths: (n,) float32, the singular values.
        rows: the number of rows so far.
        mean: (features,) float64, of all rows.
        squares: (features,) float64, sums of squared deviations from the mean.
        waiting: the first rows, while they are fewer than n.
    """

    size: int
    tau: float
    components: torch.Tensor | None = None
    explained: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    converged: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    strengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    rows: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    waiting: list[torch.Tensor] = field(default_factory=list)

    def add(self, rows: torch.Tensor) -> None:
        """Update the components with rows (any number, features); the first rows wait until there are `size`."""
        self.waiting.append(rows.float())
        if sum(map(len, self.waiting)) < self.size:
            return
        rows, self.waiting = torch.cat(self.waiting), []
        before, total = self.components, self.rows + len(rows)
        own_mean = rows.mean(0, dtype=torch.float64)
        centred = rows - own_mean.to(rows.dtype)
        squares = centred.square().sum(0, dtype=torch.float64)
        if before is None:
            mean = own_mean
        else:
            shift, weight = self.mean - own_mean, self.rows * len(rows) / total
            mean = (self.mean * self.rows + own_mean * len(rows)) / total
            squares = self.squares + squares + shift.square() * weight
            parts = self.strengths[:, None] * before, centred, (shift * weight**0.5)[None]
            centred = torch.cat([part.double() for part in parts])  # as in PEFT
        strengths, components = _decompose(centred, self.size)
        self.rows, self.mean, self.squares = total, mean, squares
        self.strengths, self.components = strengths, components
        self.explained = strengths.double().square() / squares.sum()
        if before is not None:
            self.converged = F.cosine_similarity(components, before) >= self.tau

    def has_converged(self, count: int) -> bool:
        """Return whether the first `count` components have converged."""
        return len(self.converged) > 0 and bool(self.converged[:count].all())


def _decompose(matrix: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest `size` singular values (n,) and right singular vectors (n, features).

    The largest element of each vector is positive, so that vectors of two batches can be compared.
    """
    _, values, right = svd_lowrank(matrix, min(2 * size, *matrix.shape), ITERATIONS, SEED)
    vectors = right.T[:size]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values[:size], vectors * largest.sign()


class _Inputs:
    """The inputs of layers in one forward, by name."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.seen: dict[str, torch.Tensor] = {}

    @contextmanager
    def recorded(self, names: set[str], caller: Caller) -> Iterator[None]:
        """Record the first input of each of these layers inside.

        Raises:
            LoRAError: a layer did not run inside.
        """
        self.seen = {}

        def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.seen.setdefault(name, args[0] if args else next(iter(kwargs.values())))

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: note(name, args, kwargs)

        handles = [self.layers[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        idle = [name for name in self.layers if name in names and name not in self.seen]
        if idle:
            raise LoRAError(
                f"{caller.verb}: {idle[0]!r} did not run in {caller.forward} ({len(idle)} of {len(names)} layers); "
                f"leave it out with exclude_modules, or let {caller.forward} call it."
            )


def _shared(seen: Mapping[str, torch.Tensor], sizes: Mapping[str, int], tau: float) -> dict[str, PrincipalComponents]:
    """Return empty components for each layer; layers with equal inputs share one object, of the largest size."""
    names: list[list[str]] = []
    for name, value in seen.items():
        equal = (group for group in names if _equal(seen[group[0]], value))
        same = next(equal, None)
        if same is None:
            names.append([name])
        else:
            same.append(name)
    found = {}
    for group in names:
        components = PrincipalComponents(max(sizes[name] for name in group), tau)
        found.update(dict.fromkeys(group, components))
    return found


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def _unconverged(
    found: Found,
    needed: Callable[[Found], Mapping[str, int]],
) -> list[str]:
    """Return the layers with fewer converged components than needed; every layer while one has no components."""
    if any(each.components is None for each in found.values()):
        return list(found)
    ranks = needed(found)
    return [name for name, each in found.items() if not each.has_converged(ranks[name])]


def _rows(value: torch.Tensor, mask: torch.Tensor | None, name: str, verb: str) -> torch.Tensor:
    """Return a layer's inputs (..., features) as rows (tokens, features), only those where the mask is true.

    Raises:
        LoRAError: a value is not finite. The message begins with the verb.
    """
    if mask is not None and value.shape[: mask.dim()] == mask.shape:
        value = value[mask.to(value.device)]
    rows = value.reshape(-1, value.shape[-1])
    if not rows.isfinite().all():
        raise LoRAError(f"{verb}: the inputs of {name!r} hold NaN or Inf.")
    return rows
