"""initialize_from_data, redistribute_ranks: what A starts as, and each rank, from batches (EVA, arXiv:2410.07170)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import copy_
from ..errors import LoRAError
from ..matching import exact_key
from ..model.adapted_model import AdaptedModel, open_model, refuse_replaced_layers
from ..model.merging import holds_merged
from ..names import listed
from ..nn.adapted_weights import AdaptedWeights
from ..nn.low_rank import CONV1D, LINEAR
from ..nn.random_stream import svd_lowrank
from ..nn.writer import Turn
from ..progress import progress_bar
from .batches import Caller, evaluating, from_first_rank, in_step
from .lora_ga import start_from_gradients

FROM_DATA = ("eva", "lora_ga")  # values of init_lora_weights that say so
ITERATIONS, SEED = 4, 42  # of the decomposition, as in PEFT
TAU = 0.99  # as in PEFT
IGNORED = -100  # the label of a token that is not learned from, as in transformers

Forward = Callable[[nn.Module, Any], object]
Mask = Callable[[Any], torch.Tensor | None]
Number = TypeVar("Number", int, float)

log = logging.getLogger(__name__)


def call_with(model: nn.Module, batch: Any) -> object:
    """Call the model with a batch: a mapping's entries by their names, a list's or tuple's in order, else the batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def learned_tokens(batch: Any) -> torch.Tensor | None:
    """Return which tokens of a batch count, as bool (batch, tokens): those that are attended to and learned from."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return None
    mask: torch.Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return mask & (batch["labels"] != IGNORED) if "labels" in batch else mask


def initialize_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call_with,
    *,
    mask: Mask = learned_tokens,
    tau: float = TAU,
) -> None:
    """Let the adapters of linear layers start from data, as init_lora_weights says. In place.

    "lora_ga": from the gradients of the weights, see start_from_gradients. Otherwise A becomes the principal
    components of the layer's inputs, and B stays zero (EVA, arXiv:2410.07170). The model's outputs do not change. The
    base runs in eval mode; modes and the random stream are as before. Layers of other kinds keep what they have, and
    are logged.

    Collective where torch.distributed is initialised: every rank calls this with batches of its own. All get the first
    rank's components, and the mean of all ranks' gradients.

    Args:
        model: an injected model, before training.
        batches: what `forward` takes. All are used for gradients; for components, until these have converged.
        forward: runs the model on one batch; for gradients it returns the loss, or what holds it as `loss`.
        mask: says of a batch which of its tokens count, as bool (batch, tokens), or None for all. For components.
        tau: a component has converged when its cosine similarity to that of the batch before is this much.

    Raises:
        LoRAError: the model was not injected, is merged or was trained already, there are no batches, a layer never
            ran or what it got is not finite, or a weight has no gradient to start from. Nothing is changed.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
        >>> initialize_from_data(model, [torch.randn(64, 8) for _ in range(50)])
    """
    handle = open_model(model, "initialize_from_data")
    start_from_batches(handle, batches, forward, mask, tau)
    handle.record.started = True


def start_from_batches(
    handle: AdaptedModel,
    batches: Iterable[Any],
    forward: Forward,
    mask: Mask = learned_tokens,
    tau: float = TAU,
    caller: Caller = Caller(),  # noqa: B008
) -> None:
    """Do what initialize_from_data does, for a caller whom messages name."""
    layers = _linear_layers(handle, caller.verb)
    with Turn("initialize_from_data", [handle.record.writer]):
        if handle.record.config.has_start:
            start_from_gradients(handle.model, layers, batches, forward, caller)
        else:
            _start_from_inputs(handle.model, layers, batches, forward, mask, tau, caller)
    others = [name for name in handle.layers if name not in layers]
    if others:
        log.info("lightning_lora: %s start as without data, which is for linear layers alone", listed(others))


def _start_from_inputs(
    model: nn.Module,
    layers: Mapping[str, AdaptedWeights],
    batches: Iterable[Any],
    forward: Forward,
    mask: Mask,
    tau: float,
    caller: Caller,
) -> None:
    """Let A be the principal components of the inputs. In place."""
    sizes = {name: min(layer.lora.spec.r, layer.lora_A.shape[1]) for name, layer in layers.items()}
    found = _principal_components(model, layers, batches, forward, mask, tau, caller, sizes, lambda components: sizes)
    for name, layer in layers.items():
        values = from_first_rank(found[name].components)[: sizes[name]]
        start = values.new_zeros(layer.lora_A.shape)  # a rank beyond the number of features is not used
        start[: len(values)] = values
        copy_(layer.lora_A, start.to(layer.lora_A))


def redistribute_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward = call_with,
    *,
    mask: Mask = learned_tokens,
    rho: float = 2.0,
    tau: float = TAU,
    adjust_alpha: bool = True,
) -> LoRAConfig:
    """Return options that divide the ranks anew, by how much of its inputs' variance each layer's components explain.

    The sum of the ranks stays (arXiv:2410.07170). The model is not changed: unload it and inject the options, or give
    them to LoRACallback. Collective, as initialize_from_data.

    Args:
        model, batches, forward, mask, tau: as for initialize_from_data.
        rho: a layer gets at most this many times its r, at least 1.
        adjust_alpha: keep each layer's s, by another lora_alpha.

    Returns:
        The model's options with rank_pattern and alpha_pattern; layers that get no rank are in exclude_modules.

    Raises:
        LoRAError: as initialize_from_data, or rho is less than 1.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights="eva"))
        >>> config = redistribute_ranks(model, [torch.randn(64, 8) for _ in range(50)])
        >>> sum(config.rank(name) for name in names)
        4
    """
    if not rho >= 1:
        raise LoRAError(f"redistribute_ranks: rho must be a number of at least 1, but it is {rho!r}.")
    handle = open_model(model, "redistribute_ranks")
    layers = _linear_layers(handle, "redistribute_ranks")
    ranks = {name: layer.lora.spec.r for name, layer in layers.items()}
    sizes = {name: min(round(rho * r), layers[name].lora_A.shape[1]) for name, r in ranks.items()}
    found = _principal_components(
        handle.model,
        layers,
        batches,
        forward,
        mask,
        tau,
        Caller("redistribute_ranks"),
        sizes,
        lambda components: _divide(sum(ranks.values()), components),
    )
    explained = {name: from_first_rank(each.explained) for name, each in found.items()}
    divided = _divide(sum(ranks.values()), found, explained)
    return _with_ranks(handle.record.config, layers, divided, adjust_alpha)


@dataclass
class PrincipalComponents:
    """Principal components of rows that come in batches, about their mean: incremental PCA (Ross et al. 2008).

    Attributes:
        size: n, how many components are kept.
        tau: the cosine similarity from which on a component counts as converged.
        components: (n, features) float32, of unit length, the strongest first.
        explained: (n,) float64, each one's share of the variance.
        converged: (n,) bool.
    """

    size: int
    tau: float
    components: torch.Tensor | None = None
    explained: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    converged: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    strengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # singular values
    rows: int = 0  # that were seen
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # (features,) float64
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # sums of squares about the mean
    waiting: list[torch.Tensor] = field(default_factory=list)  # rows that are too few to begin with

    def add(self, rows: torch.Tensor) -> None:
        """Take rows (n, features) into account, as soon as there are as many as components."""
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
        self.rows, self.mean, self.squares, self.strengths, self.components = (
            total,
            mean,
            squares,
            strengths,
            components,
        )
        self.explained = strengths.double().square() / squares.sum()
        if before is not None:
            self.converged = F.cosine_similarity(components, before) >= self.tau

    def has_converged(self, count: int) -> bool:
        """Return whether the first components, of this count, have converged."""
        return len(self.converged) > 0 and bool(self.converged[:count].all())


def _decompose(matrix: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest singular values and right singular vectors, each with its largest element positive."""
    _, values, right = svd_lowrank(matrix, min(2 * size, *matrix.shape), ITERATIONS, SEED)
    vectors = right.T[:size]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values[:size], vectors * largest.sign()


def _linear_layers(handle: AdaptedModel, verb: str) -> dict[str, AdaptedWeights]:
    """Return the adapted layers whose inputs have components.

    Raises:
        LoRAError: there are none, or the model is not as injection left it.
    """
    refuse_replaced_layers(handle, verb)
    layers = handle.layers
    if holds_merged(layers.values()):
        raise LoRAError(f"{verb}: the model is merged; call unmerge(model) first.")
    linear = {
        name: layer
        for name, layer in layers.items()
        if layer.kind() in (LINEAR, CONV1D) and layer.lora.spec.enabled is None
    }
    if not linear:
        raise LoRAError(f"{verb}: none of the {len(layers)} adapted layers is linear, so that no inputs tell anything.")
    trained = [name for name, layer in linear.items() if not layer.is_initial()]
    if trained:
        raise LoRAError(f"{verb}: B of {trained[0]!r} is not zero: the adapter was trained or loaded; call it before.")
    return linear


def _principal_components(
    model: nn.Module,
    layers: Mapping[str, AdaptedWeights],
    batches: Iterable[Any],
    forward: Forward,
    mask: Mask,
    tau: float,
    caller: Caller,
    sizes: Mapping[str, int],
    needed: Callable[[Mapping[str, PrincipalComponents]], Mapping[str, int]],
) -> dict[str, PrincipalComponents]:
    """Return each layer's components; layers that get the same inputs share them.

    Args:
        caller: whom messages name.
        sizes: how many components, by layer.
        needed: how many of them have to converge, by layer.
    """
    inputs = _Inputs({name: layer.lora_holder for name, layer in layers.items() if name in sizes})
    found: dict[str, PrincipalComponents] = {}
    with evaluating(model), torch.no_grad(), progress_bar("initialising", len(layers)) as advance:
        shown = 0
        for batch in in_step(batches, lambda: bool(found) and not _unconverged(found, needed)):
            keep = mask(batch)
            with inputs.recorded(set(found and _unconverged(found, needed)) or set(layers), caller):
                forward(model, batch)
            if not found:
                found.update(_shared(inputs.seen, sizes, tau))
            recorded = {id(found[name]): name for name in inputs.seen}  # once where several share components
            for name in recorded.values():
                found[name].add(_rows(inputs.seen[name], keep, name, caller.verb))
            done = len(layers) - len(_unconverged(found, needed))
            advance(max(done - shown, 0))
            shown = max(done, shown)
    if not found:
        raise LoRAError(f"{caller.verb}: there are no batches.")
    few = [name for name, components in found.items() if components.components is None]
    if few:
        each = found[few[0]]
        raise LoRAError(
            f"{caller.verb}: {few[0]!r} was to get {each.size} components, and all batches together have "
            f"{sum(map(len, each.waiting))} inputs for it; give more batches, or a smaller r."
        )
    slow = _unconverged(found, needed)
    if slow:
        warnings.warn(
            f"lightning_lora: the components of {listed(slow)} ({len(slow)} of {len(layers)} layers) had not converged "
            f"when the batches ended; they are used as they are. {caller.slow}.",
            stacklevel=3,
        )
    return found


class _Inputs:
    """What layers are called with, in one forward."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.seen: dict[str, torch.Tensor] = {}

    @contextmanager
    def recorded(self, names: set[str], caller: Caller) -> Iterator[None]:
        """Record inside the first input of each of these layers, and check afterwards that they all ran."""
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
    """Return components still to be found; layers whose inputs are equal share them, as many as any of them needs."""
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
    found: Mapping[str, PrincipalComponents],
    needed: Callable[[Mapping[str, PrincipalComponents]], Mapping[str, int]],
) -> list[str]:
    if any(each.components is None for each in found.values()):
        return list(found)
    ranks = needed(found)
    return [name for name, each in found.items() if not each.has_converged(ranks[name])]


def _rows(value: torch.Tensor, mask: torch.Tensor | None, name: str, verb: str) -> torch.Tensor:
    """Return a layer's inputs as rows (tokens, features), without those that do not count.

    Raises:
        LoRAError: one is not finite; the message begins with the verb.
    """
    if mask is not None and value.shape[: mask.dim()] == mask.shape:
        value = value[mask.to(value.device)]
    rows = value.reshape(-1, value.shape[-1])
    if not rows.isfinite().all():
        raise LoRAError(f"{verb}: the inputs of {name!r} hold NaN or Inf.")
    return rows


def _divide(
    budget: int, found: Mapping[str, PrincipalComponents], explained: Mapping[str, torch.Tensor] | None = None
) -> dict[str, int]:
    """Give the budget of ranks to the components that explain most; of equal inputs the first layer gets most."""
    shares = explained or {name: each.explained for name, each in found.items()}
    order = [(name, share) for name, values in shares.items() for share in values.tolist()]
    ranks = dict.fromkeys(found, 0)
    for name, _ in sorted(order, key=lambda entry: -entry[1])[:budget]:
        ranks[name] += 1
    return ranks


def _with_ranks(
    config: LoRAConfig, layers: Mapping[str, AdaptedWeights], ranks: Mapping[str, int], adjust_alpha: bool
) -> LoRAConfig:
    rank_pattern, alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    new_ranks = {exact_key(name): r for name, r in ranks.items() if r and r != layers[name].lora.spec.r}
    new_alphas = {
        exact_key(name): layers[name].lora.spec.alpha
        * (r / layers[name].lora.spec.r) ** (0.5 if config.use_rslora else 1)
        for name, r in ranks.items()
        if r and r != layers[name].lora.spec.r
    }
    idle = [name for name, r in ranks.items() if not r]
    excluded = config.exclude_modules
    if idle and isinstance(excluded, str):
        raise LoRAError(
            f"redistribute_ranks: {listed(idle)} get no rank, and exclude_modules={excluded!r} is a regular "
            "expression, to which no names can be added; give a list of names."
        )
    return replace(
        config,
        rank_pattern=_put_before(new_ranks, rank_pattern) or None,
        alpha_pattern=_put_before(new_alphas if adjust_alpha else {}, alpha_pattern) or None,
        exclude_modules=[*(excluded or ()), *idle] or None,
    )


def _put_before(new: Mapping[str, Number], earlier: Mapping[str, Number]) -> dict[str, Number]:
    """Return both patterns; the first key that fits a layer counts, and a key of both has the new value."""
    return {**new, **{key: value for key, value in earlier.items() if key not in new}}
