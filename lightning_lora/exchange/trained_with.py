"""Whether a model has the adapters attached that another adapter was trained with. A file holds their names,
strengths and fingerprints, and not their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..adapter.adapter import Adapter, strengths_text
from ..errors import LoRAError
from ..model.adapted_model import AdaptedModel, Listing, find_adapted
from ..model.attached import checked_strength
from ..nn.attached_factors import Attachment

Attachments = Mapping[str, Attachment]  # what is attached to a model, by name
Remedy = Callable[[Attachments], str]  # makes the advice for adapters that are not attached


def by_attach(missing: Mapping[str, Attachment], *, strict_base: bool = True) -> str:
    """Return the calls that attach adapters, each from a source that the user must know."""
    more = "" if strict_base else ", strict_base=False"
    calls = (
        f"attach(model, source, name={name!r}, strength={each.strength:g}{more})" for name, each in missing.items()
    )
    return "; ".join(calls)


def by_load_adapter(missing: Mapping[str, Attachment]) -> str:
    """Return the advice of load_adapter."""
    return f"Attach it first: {by_attach(missing)}."


def by_callback(missing: Mapping[str, Attachment]) -> str:
    """Return the advice where a Trainer loads the checkpoint."""
    sources = ", ".join(
        f"{name!r}: {{'source': source, 'strength': {each.strength:g}}}" for name, each in missing.items()
    )
    return f"Give it to the callback: LoRACallback(attach={{{sources}}}), or call attach before."


def refuse_missing(here: Attachments, adapter: Adapter, remedy: Remedy = by_load_adapter) -> None:
    """Raise LoRAError where an adapter was trained with one that is not attached to the model."""
    missing = {name: each for name, each in sorted(adapter.attached.items()) if name not in here}
    if missing:
        raise LoRAError(
            f"adapter: it was trained with {strengths_text(missing)} attached, which this model does not have, and "
            f"the source does not hold. {remedy(missing)}"
        )
    lacking = sorted(adapter.lacking - here.keys())
    if lacking:
        calls = "; ".join(f"attach(model, source, name={name!r})" for name in lacking)
        raise LoRAError(
            f"adapter: the state dict is of a model with attached adapters, which no state dict holds, and "
            f"{lacking[0]!r} is not attached here. Attach it first: {calls}; "
            "dict(state_dict) does not say it, and is loaded without."
        )


def check_attached(listing: Listing, adapter: Adapter) -> None:
    """Raise LoRAError unless a model has all adapters attached that another adapter was trained with, as they were.

    More may be attached.

    Args:
        listing: of the model, adapted or not.
        adapter: under the model's names.
    """
    here = attached_in(listing)
    refuse_missing(here, adapter)
    refuse_others(here, adapter)
    for name, each in sorted(adapter.attached.items()):
        if here[name].strength != each.strength:
            raise LoRAError(
                f"adapter: it was trained with {name!r} attached at strength {each.strength:g}, and here the strength "
                f"is {here[name].strength:g}. Call set_strength(model, {each.strength:g}, {name!r}) first."
            )


def check_attached_of_run(handle: AdaptedModel, adapter: Adapter) -> dict[str, float]:
    """Raise LoRAError unless exactly those adapters are attached that a Trainer's checkpoint was trained with.

    Strengths of a file that no forward could use are refused here, before anything of the checkpoint is taken.

    Returns:
        The strengths of the checkpoint that differ from the model's, by name: a run goes on with those it had.
    """
    here = handle.injection.attached
    refuse_missing(here, adapter, by_callback)
    refuse_others(here, adapter)
    more = sorted(here.keys() - adapter.attached.keys())
    if more:
        raise LoRAError(
            f"adapter: it was trained without {more[0]!r}, which is attached to this model. Leave it out of "
            f"LoRACallback(attach=...), or call detach(model, {more[0]!r}) first."
        )
    strengths = {name: checked_strength(each.strength, "adapter") for name, each in adapter.attached.items()}
    return {name: strength for name, strength in strengths.items() if strength != here[name].strength}


def refuse_others(here: Attachments, adapter: Adapter) -> None:
    """Raise LoRAError where the adapter that is attached under a name is another than it was in the training."""
    for name, each in sorted(adapter.attached.items()):
        if each.fingerprint != here[name].fingerprint:
            raise LoRAError(
                f"adapter: it was trained with another adapter {name!r} attached than the one here. Call "
                f"detach(model, {name!r}), and attach the one of the training."
            )


def attached_in(listing: Listing) -> Attachments:
    """Return what is attached to a model, by name; nothing where it is not adapted."""
    handle = listing if isinstance(listing, AdaptedModel) else find_adapted(listing, attached=True)
    return handle.injection.attached if handle is not None else {}
