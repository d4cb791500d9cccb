"""merge, unmerge and merged: write W' into all adapted layers of a model or into none, and restore W bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from ..distributed.flat import begin_writing, free_gathered
from ..distributed.rank_sync import RankSync
from ..distributed.sharding import dimensions_of_ranks, is_spread, local, reshard_
from ..errors import LoRAError, NonFiniteError
from ..nn.adapted_module import adapted_places, claimed_with, injections_of
from ..nn.adapted_weights import AdaptedWeights, Blocks
from ..nn.claims import Claim
from ..nn.exact_merge import Buffers
from ..nn.low_rank import HALF
from ..nn.readers import update_fast_paths
from ..nn.rounding import Rounding
from ..nn.tied_weights import record_ties
from ..progress import progress_bar
from .adapted_model import Listing, find_adapted
from .dequantize import report_factored
from .gradients import warn_of_untrained
from .recorded_layers import refuse_replaced_layers
from .transaction import transaction
from .wrappers import unwrapped

UNROUNDED = (  # the remedy where rounding a merged evaluation costs much
    "Merged and unmerged outputs differ by that much of the adapter's effect; with merged_eval=False the adapter is "
    "evaluated unrounded."
)
COPY_BUDGET = 64 * 2**20  # bytes: up to this size of all adapted weights plain copies are kept, which is faster


def is_merged(model: nn.Module) -> bool:
    """Return whether merge was called and not undone, even if some layers had to stay factored.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> is_merged(model)
        False
        >>> with merged(model):
        ...     is_merged(model)
        True
    """
    return holds_merged(Listing(unwrapped(model, "is_merged")))


def holds_merged(listing: Listing) -> bool:
    """Return whether merge was called for a layer of a listed model and not undone.

    Layers in which attached adapters act alone count: they are merged also where no layer has a trained adapter.
    """
    return any(layer.lora.merged or layer.lora.unfinished for layer in listing.all_layers.values())


def merge(model: nn.Module) -> None:
    """Write W' = W + s * B @ A into every adapted layer's weight; unmerge restores W bit for bit. In place.

    Harmless when repeated, and inside disable_adapter. A layer stays factored where another module shares its weight,
    and where its weight is quantized. The first merge of 16-bit layers logs the cost of rounding W'.

    Collective: every rank of a sharded model calls this. The factors are gathered, the weights are not.

    Raises:
        LoRAError: the model has no adapted layer, or an adapted layer was replaced. Every layer is then unmerged.
        NonFiniteError: W' of a layer is not finite on some rank. Every layer is then unmerged.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> merge(model)
        >>> is_merged(model)
        True
    """
    merge_listed(Listing(unwrapped(model, "merge")))


def merge_listed(listing: Listing, *, warns: bool = True) -> None:
    """Do what merge does for a listed model. In place.

    Args:
        listing: of the model.
        warns: of untrained layers, and of what rounding costs; else that is a line without a warning. A fit warns of
            untrained layers itself, and an adapter that has just begun to grow loses most of itself.
    """
    refuse_replaced_layers(listing, "merge")
    _require_layers(listing, "merge")
    with claimed_with(listing.all_layers.values(), "merge"):
        pending = {
            name: layer
            for name, layer in listing.all_layers.items()
            # A merge that was broken off is undone and done again.
            if (layer.lora_active and not layer.lora.merged) or layer.lora.unfinished
        }
        if pending:
            for injection in injections_of(listing.all_layers.values()):
                injection.marks.add("merged")  # first, because an exception may break off what follows
            if warns:
                warn_of_untrained(listing, stacklevel=4)
            with shards_in_place(listing, "merge"):
                _merge_pending(listing, pending, UNROUNDED if warns else "")


def _merge_pending(listing: Listing, pending: Mapping[str, AdaptedWeights], remedy: str) -> None:
    """Merge the pending layers of a model, all of them or none. In place. `remedy` is that of tell_rounding."""
    weights = {layer: layer.own_weight() for layer in listing.all_layers.values()}
    written = [weight for layer, weight in weights.items() if not layer.why_not_merge()]
    copy = sum((local(weight) if is_spread(weight) else weight).nbytes for weight in written) <= COPY_BUDGET
    # torch.no_grad once for all layers, because entering it takes longer than merging a small layer
    with torch.no_grad(), transaction() as on_error:
        on_error.callback(_restore_all, listing)
        record_ties(listing.modules)
        sync, buffers = RankSync(weights[layer] for layer in pending.values()), Buffers()
        rounding = Rounding(sync)
        for layer in pending.values():
            if layer.lora.unfinished:  # an exception broke off what took another exception's merge back
                layer.unmerge_(buffers)
        with progress_bar("merging", len(pending)) as advance:
            for name, layer in pending.items():
                if layer.why_not_merge():
                    layer.lora.merged = True
                else:
                    cost = rounding.of(layer, weights[layer]) if weights[layer].dtype in HALF else None
                    arguments = weights[layer], layer.blocks(weights[layer]), copy, cost, buffers
                    sync.run(f"merge: layer {name!r}", _merge_layer, layer, *arguments)
                advance(1)
        sync.raise_on_any_rank()
        rounding.tell("merged 16-bit weights", remedy, stacklevel=4)
        report_factored(pending.values())
        update_fast_paths(module for _, module in listing.modules)


def unmerge(model: nn.Module) -> None:
    """Give every adapted layer's weight the bits that it had before merge. In place; harmless when repeated.

    Raises:
        LoRAError: the model has no adapted layer, or a weight cannot be restored because something changed it while
            it was merged. The other layers are restored; the changed weight is left as it is and cannot be saved.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> weight = model[0].weight.clone()
        >>> merge(model)
        >>> unmerge(model)
        >>> torch.equal(model[0].weight, weight)
        True
    """
    unmerge_listed(Listing(unwrapped(model, "unmerge")))


def unmerge_listed(listing: Listing) -> None:
    """Do what unmerge does for a listed model. In place."""
    _require_layers(listing, "unmerge")
    layers = listing.all_layers.values()
    writing = shards_in_place(listing, "unmerge") if holds_merged(listing) else nullcontext()
    with claimed_with(layers, "unmerge"), torch.no_grad(), writing, transaction() as on_error:
        # This completes the call: W' is made of factors, but W only of what is kept.
        on_error.callback(_restore_all, listing)
        _restore_all(listing)


def unmerge_if_merged(listing: Listing) -> None:
    """Unmerge a listed model that is merged. In place."""
    if holds_merged(listing):
        unmerge_listed(listing)


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Merge the model inside; afterwards it is merged or not as it was found, even after an exception.

    A model that was injected with merge_weights and changes its mode inside is merged or not as the new mode says.

    Raises:
        LoRAError: as merge; or another thread changes the model before the block ends.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> weight = model[0].weight.clone()
        >>> with merged(model):
        ...     torch.equal(model[0].weight, weight)
        False
        >>> torch.equal(model[0].weight, weight)
        True
    """
    listing = Listing(unwrapped(model, "merged"))
    with claimed_with(listing.all_layers.values(), "merged") as claim:
        yield from run_block(claim, model, partial(merge_listed, listing), FoundState(listing).bring_back)


def run_block(
    claim: Claim, model: nn.Module, begin: Callable[[], None], restore: Callable[[], None]
) -> Iterator[nn.Module]:
    """Change a model, let the body of a `with` block run, and restore the model.

    A generator for `yield from` in the block's own.

    Args:
        claim: of the block, which may end in another thread than it began in.
        model: what the block yields.
        begin: changes the model.
        restore: restores it. It can be called again after any part of itself.

    Raises:
        LoRAError: another thread is changing the model when the block ends, or a step raised it.
    """
    is_done = False

    def end() -> None:
        nonlocal is_done
        if is_done:
            return
        try:
            claim.take()
            restore()
        except LoRAError:  # which a second try would only raise again
            is_done = True
            raise
        is_done = True

    # Ctrl-C, a debugger or another thread may raise an exception between any two lines: before the inner `finally` has
    # called end(), or inside of restore(). Then the outer one restores the model. `yield from` adds no line of Python
    # between the body and these; a context manager around the body would: its __exit__.
    try:
        try:
            begin()
            yield model
        finally:
            end()
    finally:
        end()


class FoundState:
    """Remember whether a model was merged, and bring that back after a `with` block."""

    def __init__(self, listing: Listing) -> None:
        """Note the state of a model that was listed before the block."""
        layers = listing.all_layers.values()
        self.model, self.merged = listing.model, any(each.lora.merged for each in layers)
        by_mode = [injection for injection in injections_of(layers) if "merges by mode" in injection.marks]
        roots = (injection.root() for injection in by_mode if injection.root is not None)
        self.modes = {root: root.training for root in roots if root is not None}  # of roots injected with merge_weights

    def bring_back(self, listing: Listing | None = None) -> None:
        """Merge or unmerge the model as it was found; with merge_weights, after a change of mode, as it says. In place.

        Args:
            listing: of the model; made anew where it is left out, because the block may have replaced layers.
        """
        listing = listing or Listing(self.model)
        changed = [root.training for root, training in self.modes.items() if root.training != training]
        is_to_be_merged = not changed[0] if changed else self.merged
        if listing.all_layers and holds_merged(listing) != is_to_be_merged:
            (merge_listed if is_to_be_merged else unmerge_listed)(listing)


@contextmanager
def shards_in_place(listing: Listing, verb: str) -> Iterator[None]:
    """Put the shards of a sharded model in place of gathered weights, and let what is written into them count.

    Args:
        listing: of the model.
        verb: the public function that the user called, for a message.

    Raises:
        LoRAError: a forward has gathered weights, and runs or was ended by an exception; or fully_shard was called on
            a module outside of this one, which has gathered a weight.
    """
    modules = [module for _, module in listing.modules]
    begin_writing(modules, verb)
    reshard_(modules)
    for name, layer in listing.all_layers.items():
        sharded = dimensions_of_ranks(layer.adapted_weight())
        if sharded < layer.lora.sharded:
            raise LoRAError(
                f"{name!r}: its weight is gathered by FSDP2, by a module outside of {type(listing.model).__name__} or "
                "in a forward that an exception ended. Pass the module that fully_shard was called on last, or build "
                "the model again."
            )
        layer.lora.sharded = sharded
    try:
        yield
    finally:
        free_gathered(modules)  # in a forward, ZeRO-3 gathers a parameter as soon as it is looked at


def _require_layers(listing: Listing, verb: str) -> None:
    if not listing.all_layers and find_adapted(listing) is None:
        kind = type(listing.model).__name__
        raise LoRAError(f"{verb}: {kind} has no adapted layer; call inject(model, LoRAConfig(...)).")


def _merge_layer(
    layer: AdaptedWeights, weight: torch.Tensor, blocks: Blocks, copy: bool, cost: list[float] | None, buffers: Buffers
) -> None:
    try:
        layer.merge_(weight=weight, blocks=blocks, copy=copy, cost=cost, buffers=buffers)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error}. Every layer is unmerged; look for a diverged training run (a lower learning rate, gradient "
            "clipping) or evaluate with merged_eval=False."
        ) from error


def _restore_all(listing: Listing) -> None:
    """Unmerge every layer. Another call completes the work where an exception broke it off. In place."""
    failures: list[str] = []
    buffers = Buffers()
    try:
        with progress_bar("unmerging", len(listing.all_layers)) as advance:
            for name, layer in listing.all_layers.items():
                try:
                    if layer.lora.merged or layer.lora.unfinished:
                        layer.unmerge_(buffers)
                except LoRAError as error:  # the others are restored
                    failures.append(f"unmerge: layer {name!r}: {error}.")
                advance(1)
        if failures:
            raise LoRAError("\n".join(failures))
        places = len(list(adapted_places(listing.model, modules=listing.modules)))  # a table counts under each name
        for injection in injections_of(listing.all_layers.values()):
            if places >= len(injection.layers):  # else a part was unmerged
                injection.marks.discard("merged")
    finally:
        update_fast_paths(module for _, module in listing.modules)
