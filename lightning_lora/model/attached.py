"""Attached adapters of a model: put in and taken out, and the strength of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..config import LoRAConfig, is_number, plain_number
from ..errors import LoRAError, shown
from ..matching import near_misses
from ..names import listed
from ..nn.adapted_module import AdaptedModule, adapted_places, unadapt_
from ..nn.adapted_weights import NOTHING, AdaptedWeights, LayerSpec
from ..nn.attached_factors import AttachedFactors, Attachment, Packed
from ..nn.claims import DISABLED, OFF, Claims, claimed
from ..nn.gradient_checkpointing import enable_input_require_grads
from ..nn.layer_kinds import adapt_
from ..nn.parameter import adapt_parameter_, weights_of
from ..nn.quantized import keep_gradients_
from ..nn.readers import patch_readers, undo_readers, update_fast_paths
from ..nn.tied_weights import record_ties
from ..notices import tell
from .adapted_model import AdaptedModel, Listing, find_adapted, injection_of_root, open_model
from .facts import begin_facts, end_facts, note_adapted_children
from .initial_in_place import initial_values_of, put_in_, take_out_
from .injection import Chosen, Injection
from .load_state_dict import hook_load_state_dict, unhook_load_state_dict
from .merging import FoundState, run_block, unmerge_if_merged
from .patches import unpatch
from .pretrained import patch_gradient_checkpointing, patch_save_pretrained
from .reasons import LAYER, PARAMETER, Candidate
from .transaction import transaction
from .wrappers import unwrapped

Strengths = Mapping[str, float]  # by name; "" is the trained adapter


def attached(model: nn.Module) -> dict[str, float]:
    """Return the strength of each attached adapter by name, in the order of names; nothing where none is attached.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> save_adapter(model, "sft")
        >>> names = attach(model, "sft", name="sft", strength=0.5)
        >>> attached(model)
        {'sft': 0.5}
    """
    handle = find_adapted(Listing(unwrapped(model, "attached")), attached=True)
    return {} if handle is None else {name: each.strength for name, each in handle.injection.attached.items()}


def detach(model: nn.Module, name: str) -> None:
    """Take an attached adapter out again. In place; what the model computes is then as if it had never been attached.

    Raises:
        LoRAError: no adapter of this name is attached.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> names = attach(model, take_adapter(model), name="twice")
        >>> detach(model, "twice")
        >>> attached(model)
        {}
    """
    handle = open_model(model, "detach", attached=True)
    require_attached(handle, name, "detach")

    def finish() -> None:
        """Take it out of the other layers, where that was broken off."""
        if name not in handle.injection.attached:
            take_out_attached_(handle, name)

    change_unmerged_(handle, "detach", partial(take_out_attached_, handle, name), finish)


def set_strength(model: nn.Module, strength: float | Strengths, name: str = "") -> None:
    """Change the strength of an attached adapter. In place, and exact: the strength of before gives each bit of before.

    What peft calls rescale_adapter_scale. Nothing is compiled anew. A merged model is merged with the new strength.

    Args:
        model: with the adapter.
        strength: the new strength, 1 as trained and 0 off; or a mapping of several, by name.
        name: of the adapter. The trained one keeps its strength, because files would not tell another; see scaled.

    Raises:
        LoRAError: there is no such adapter, a strength is no finite number, or W' would not be finite in a merged
            model, which is then as it was.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> names = attach(model, take_adapter(model), name="style")
        >>> set_strength(model, 0.3, "style")
        >>> attached(model)
        {'style': 0.3}
    """
    handle = open_model(model, "set_strength", attached=True)
    strengths = _strengths_asked_for(handle, strength, name, "set_strength")
    if "" in strengths:
        raise LoRAError(
            "set_strength: changes attached adapters only, because no file stores a strength of the trained one. Use "
            "`with scaled(model, strength):`, load_adapter(model, combine([adapter], [strength])) for good, or name "
            f"an attached adapter ({listed([repr(each) for each in handle.injection.attached]) or 'there is none'})."
        )
    before = {each: handle.injection.attached[each].strength for each in strengths}
    change_unmerged_(
        handle, "set_strength", partial(_set_strengths_, handle, strengths), partial(_set_strengths_, handle, before)
    )


@contextmanager
def scaled(model: nn.Module, strength: float | Strengths, name: str = "") -> Iterator[nn.Module]:
    """Let the trained adapter, or an attached one, act with another strength inside the block; 0 is off.

    With the trained one off, heads and biases that were trained have their initial values inside, as in
    disable_adapter. Forwards, merge, merged_state_dict, merged_tensors and save_merged go by it; save_adapter and
    a Trainer's checkpoints hold the model as it is outside. A merged model runs factored inside. In a merged evaluation
    of a Trainer it stays so for the rest of the run, so that nothing is merged again for each batch. With torch's
    activation checkpointing, call backward() inside of the block too: after it adapted layers are computed again with
    another strength, an error.

    Args:
        model: injected, or with attached adapters.
        strength: the strength, 1 as trained; or a mapping of several, by name.
        name: of an attached adapter; "" is the trained one.

    Raises:
        LoRAError: there is no such adapter; a strength is no finite number; or it is neither 0 nor 1, and the trained
            adapter is one of DoRA, trains rows or trains modules or biases whole.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> reference = model(x := torch.ones(1, 8))
        >>> names = inject(model, LoRAConfig(r=2, init_lora_weights=False))
        >>> with scaled(model, 0.0):
        ...     torch.equal(model(x), reference)
        True
    """
    handle = open_model(model, "scaled", attached=True)
    strengths = _strengths_asked_for(handle, strength, name, "scaled")
    injection = handle.injection
    if "" in strengths:
        _refuse_between(handle, strengths[""])
    is_off = strengths.get("") == 0 and any(True for _ in handle.initial_values())
    with claimed(OFF if is_off else "scaled", injection.claims) as claim:
        around = [verb for verb in (DISABLED, OFF) if injection.claims.holds(verb, other_than=claim)]
        if around and strengths.get(""):
            raise LoRAError(f"scaled: inside `with {around[0]}` the trained adapter stays off; leave its strength out.")
        found = initial_values_of(handle) if is_off and not around else []
        modules = [each.module for each in found]
        modules += [module for _, module in handle.modules if found and isinstance(module, AdaptedModule)]
        before = _strengths_in_blocks(handle)
        noted = injection.strength_log.now
        state = FoundState(handle)

        def scale() -> None:
            unmerge_if_merged(handle)
            put_in_(found, modules)
            _let_act_with_(handle, {**before, **strengths})
            own = {"": 1.0, **{each: attachment.strength for each, attachment in injection.attached.items()}}
            inside = {**noted, **strengths}
            injection.strength_log.change({each: s for each, s in inside.items() if s != own.get(each)})

        def scale_back() -> None:
            take_out_(found, modules)
            unmerge_if_merged(handle)
            _let_act_with_(handle, before)
            injection.strength_log.change(noted)
            if not injection.merged_to_evaluate:
                state.bring_back(handle)
            elif "factored" not in injection.marks:
                injection.marks.add("factored")
                tell(
                    "lightning_lora: scaled was called in a merged evaluation, which runs factored from there on; "
                    "merged_eval=False saves the merge."
                )

        yield from run_block(claim, model, scale, scale_back)


@contextmanager
def strengths_outside(handle: AdaptedModel) -> Iterator[None]:
    """Let merged copies be made inside the block with the strengths that adapters have outside of any `scaled`."""
    before = _strengths_in_blocks(handle)
    _let_act_with_(handle, {})
    try:
        yield
    finally:
        _let_act_with_(handle, before)


def _strengths_in_blocks(handle: AdaptedModel) -> dict[str, float]:
    """Return the strength of the trained adapter, and those that `scaled` has set for attached ones, by name."""
    found: dict[str, float] = {}
    for layer in handle.all_layers.values():
        found |= {"": layer.lora.strength} if layer.has_trained_adapter() else {}
        found |= layer.lora.attached.inside if layer.lora.attached is not None else {}
    return found


def _let_act_with_(handle: AdaptedModel, inside: Strengths) -> None:
    """Let the adapters of a model act with these strengths, and the others with their own. In place.

    The weights are not written. So the model is unmerged, or the caller sets the strengths back before it is merged or
    unmerged.
    """
    for layer in handle.all_layers.values():
        if layer.has_trained_adapter():
            layer.lora.strength = inside.get("", 1.0)
        if layer.lora.attached is not None:
            layer.lora.attached.act_with_(inside)


def _set_strengths_(handle: AdaptedModel, strengths: Strengths) -> None:
    """Give attached adapters of an unmerged model other strengths, for good. In place."""
    attachments = handle.injection.attached
    for layer in handle.all_layers.values():
        packed = layer.lora.attached
        for name in packed.shares.keys() & strengths.keys() if packed is not None else ():
            packed.set_strength_(name, strengths[name])  # type: ignore[union-attr]
    attachments.update({name: replace(attachments[name], strength=strength) for name, strength in strengths.items()})


def _strengths_asked_for(handle: AdaptedModel, strength: float | Strengths, name: str, verb: str) -> dict[str, float]:
    """Return the strengths that a call asks for, by name.

    Raises:
        LoRAError: there is no such adapter, or a strength is no finite number.
    """
    given = strength if isinstance(strength, Mapping) else {name: strength}
    strengths = {each: checked_strength(value, verb) for each, value in given.items()}
    for each in strengths:
        if each or not handle.injection.has_trained_adapter:
            require_attached(handle, each, verb)
    return strengths


def checked_strength(strength: object, verb: str) -> float:
    """Return a strength as a float, also one of numpy.

    Raises:
        LoRAError: it is no finite number in float32, in which forwards multiply. The message begins with the verb.
    """
    number = plain_number(strength)
    if not is_number(number) or abs(number) > torch.finfo(torch.float32).max:
        raise LoRAError(f"{verb}: a strength must be a finite number in float32, but it is {shown(strength)}.")
    return float(number)


def require_attached(handle: AdaptedModel, name: str, verb: str) -> None:
    """Raise LoRAError unless an adapter of this name is attached. The message begins with the verb."""
    known = handle.injection.attached
    if name in known:
        return
    what = f"no adapter {name!r} is attached" if name else "the model has no trained adapter"
    raise LoRAError(f"{verb}: {what}{near_misses(str(name), known) if known else ''}.")


def _refuse_between(handle: AdaptedModel, strength: float) -> None:
    """Refuse a strength of the trained adapter between off and on where there is none."""
    if strength in (0, 1):
        return
    reading = [name for name, layer in handle.layers.items() if layer.lora.spec.variant.has_scale]
    rows = [name for name, layer in handle.layers.items() if layer.replaced_rows()]
    whole = handle.trained("asked", "unfrozen")
    trained = [each.name for each in handle.base() if id(each.parameter) in whole]
    if reading:
        what = f"the adapter of {reading[0]!r} is {handle.layers[reading[0]].lora.spec.variant.title}"
    elif rows or trained:
        what = f"{trained[0]!r} is fully trained" if trained else f"rows of {rows[0]!r} are trained"
    else:
        return
    between = (
        ""
        if reading
        else (
            ". For one in between, call load_adapter(model, combine([adapter], [0.5])), which scales A and B and "
            "keeps heads and biases as they are"
        )
    )
    raise LoRAError(f"scaled: {what}, which has no strength between off and on: use 0 or 1{between}.")


# --- put in, taken out and taken over ---


def change_unmerged_(handle: AdaptedModel, verb: str, change: Callable[[], None], restore: Callable[[], None]) -> None:
    """Unmerge a model, change it, and merge it again where it was merged. In place.

    Args:
        handle: of the model.
        verb: the public function, for messages.
        change: the change.
        restore: takes the change back, or completes it, where an exception broke off any part of this call.
    """
    found = FoundState(handle)
    with claimed(verb, handle.injection.claims), transaction() as on_error:
        # What is called last comes first: the layers that are there now are unmerged, settled and merged as found.
        on_error.callback(found.bring_back, handle)
        on_error.callback(restore)
        on_error.callback(unmerge_if_merged, handle)
        on_error.callback(handle.look_for_layers_again)
        unmerge_if_merged(handle)
        change()
        found.bring_back(handle)


def begin_layers_(handle: AdaptedModel, names: Iterable[str]) -> None:
    """Adapt layers and parameters in which attached adapters act alone, where none acts yet. In place.

    Raises:
        LoRAError: one of them cannot be adapted. Those before it are adapted then.
    """
    undo_readers(module for _, module in handle.root_modules)
    modules, spec = dict(handle.modules), LayerSpec(r=0, alpha=0, scaling=1, variant=NOTHING)
    new = [name for name in names if name not in handle.all_layers]
    parameters = weights_of(modules) if not all(name in modules for name in new) else {}
    for name in new:
        owner, leaf = (modules[name], "weight") if name in modules else parameters[name]
        candidate = Candidate(LAYER if name in modules else PARAMETER, name, owner, LoRAConfig(), leaf)
        if why_not := candidate.why_not():
            raise LoRAError(f"attach: {name!r}: {why_not}.")
        layer: AdaptedWeights
        if name in modules:
            layer = adapt_(owner, name, spec, handle.injection)
        else:
            layer = adapt_parameter_(owner, leaf, name, spec, handle.injection)
        layer.lora.strength = 0.0
    handle.look_for_layers_again()


def attach_to_layers_(
    handle: AdaptedModel, name: str, pairs: Mapping[str, AttachedFactors], attachment: Attachment
) -> None:
    """Attach an adapter in every layer that it has. In place.

    Args:
        handle: of the model, unmerged.
        name: of the adapter.
        pairs: its factors, by layer, after begin_layers_.
        attachment: its strength and fingerprint.
    """
    for layer_name, pair in pairs.items():
        layer = handle.all_layers[layer_name]
        layer.lora.attached = Packed({**layer.attached(), name: pair})
    handle.injection.attached = dict(sorted({**handle.injection.attached, name: attachment}.items()))
    record_and_patch_layers(handle)


def take_out_attached_(handle: AdaptedModel, name: str) -> None:
    """Take an attached adapter out of an unmerged model, and the injection where nothing else is in it. In place."""
    injection = handle.injection
    injection.attached = {each: facts for each, facts in injection.attached.items() if each != name}
    undo_readers(module for _, module in handle.root_modules)
    for layer in handle.all_layers.values():
        rest = layer.attached()
        if rest.pop(name, None) is not None:
            layer.lora.attached = Packed(rest) if rest else None
        if layer.lora.attached is None and not layer.has_trained_adapter():
            unadapt_(layer)
    handle.look_for_layers_again()
    record_and_patch_layers(handle)
    if not injection.has_trained_adapter and not injection.attached:
        modules = [module for _, module in handle.root_modules]
        unhook_load_state_dict(modules)
        unpatch(modules)
        end_facts(modules, injection)
        injection.end(handle.root)


def record_and_patch_layers(handle: AdaptedModel) -> None:
    """Record which layers are adapted, trained or attached, and patch the modules that use them. In place.

    These are readers of weights, fast paths, checkpointing, loading and save_pretrained. Harmless when repeated.
    """
    places, modules = handle.root_modules, [module for _, module in handle.root_modules]
    handle.injection.layers = [name for name, _, _ in adapted_places(handle.root, modules=places)]
    for layer in handle.all_layers.values():
        if layer.lora.attached is not None:
            layer.lora.attached.read = False  # else layers that were read before would speak against new ones
    begin_facts(handle.root_places, handle.injection)  # before note_adapted_children, which writes into the facts
    note_adapted_children(handle.root)
    record_ties(places)
    keep_gradients_(modules)
    patch_readers(modules)
    update_fast_paths(modules)
    enable_input_require_grads(modules)
    patch_gradient_checkpointing(modules)
    hook_load_state_dict(handle.root_places)
    patch_save_pretrained(modules)


def begin_attached(model: nn.Module, claims: Claims | None = None) -> AdaptedModel:
    """Give a plain model an injection of attached adapters. In place."""
    injection = Injection(LoRAConfig(), chosen=Chosen({}), marks={"attached alone"}, claims=claims or Claims())
    injection.begin(model)
    return AdaptedModel(model, model, injection)


def find_attached_alone(listing: Listing) -> AdaptedModel | None:
    """Unmerge a model with attached adapters alone, and return its handle; None for any other model. In place.

    Raises:
        LoRAError: the adapters were attached to a larger model.
    """
    handle = find_adapted(listing, attached=True, part=True)
    if handle is None or handle.injection.has_trained_adapter:
        return None
    if handle.injection.holder() is not None and len(handle.all_layers) < len(handle.injection.layers):
        raise LoRAError(
            f"inject: {type(listing.model).__name__} is a part of the {type(handle.injection.holder()).__name__} to "
            f"which {listed([repr(name) for name in handle.injection.attached])} was attached; inject that, or detach "
            "first."
        )
    unmerge_if_merged(handle)
    return handle


def take_over_attached(listing: Listing, old: Injection, new: Injection) -> None:
    """Let a new injection have the attached adapters of a model, of which the old one has ended. In place."""
    new.attached = dict(old.attached)
    for name, layer in Listing(listing.model).all_layers.items():
        if layer.lora.attached is not None:
            layer.lora.injection, layer.lora.name = new, name


def keep_attached(root: nn.Module, old: Injection) -> None:
    """Let attached adapters stay in a model from which the trained one was taken out. In place. Can be repeated."""
    if old.attached:
        begun = injection_of_root(root)  # by a call that was broken off
        handle = begin_attached(root, old.claims) if begun is None else AdaptedModel(root, root, begun)
        take_over_attached(handle, old, handle.injection)
        record_and_patch_layers(handle)
