"""What a model remembers of its injection, and how that is found.

There is one record a model. The injected module and each adapted layer hold it, so that it is found from any module
that holds the layers: the injected one, one around it, the network inside, or a new module around the same network.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import nn

from ..config import LoRAConfig
from ..errors import LoRAError
from ..names import ATTRIBUTE, canonical, listed, rename_keys
from ..nn.lora_layer import AdaptedWeights, adapted_layers, adapted_places, is_factor
from ..nn.writer import Writer
from .named_state import base_parameters, named_state

Value = TypeVar("Value")

ALL_OPTIONS = frozenset(option.name for option in fields(LoRAConfig))


@dataclass
class Injection:
    """The record of one injection; names are relative to the injected module."""

    config: LoRAConfig
    merge_weights: bool = False  # eval() merges and train() unmerges
    scope: str = ""  # what the names of biases and whole modules that the options mean begin with: a loaded adapter's
    given: frozenset[str] = ALL_OPTIONS  # the options that the user gave; the others are at their defaults
    layers: list[str] = field(default_factory=list)  # names of the adapted layers
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of every base parameter, before injection
    # From before training: values of what it changes beside A and B (trained base parameters, persistent buffers).
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)  # names of base parameters that were ever trainable
    unfrozen: set[str] = field(default_factory=set)  # those of them that became so after injection, not by the options
    resized: set[str] = field(default_factory=set)  # those that are saved because they were resized before injection
    merged_eval: bool | None = None  # the callback's, or None without one
    save: Any = None  # the kind of Lightning checkpoint, or None for an unfiltered one
    lr_ratio: float | None = None  # of LoRA+, for an optimizer that LightningCLI makes
    dequantize: Any = None  # the dtype of quantised weights in merged checkpoints
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of the base at fit start, by LightningModule's names
    origin: dict[str, str] = field(default_factory=dict)  # what a loaded adapter says of its base, see Adapter
    validated: bool = False  # all layers were there, and each entry of the options names something
    seed: str = ""  # what adapters are drawn from, or "" for the random stream of the moment
    training_checked: bool = False  # training has begun, and what it does not reach was warned of
    checkpointing_off_reported: bool = False  # that gradient checkpointing does nothing in eval mode was said
    quantised_reported: bool = False  # that layers with quantised weights stay factored was said
    measures_rounding: bool = False  # each merge measures what rounding to 16 bits costs, not the first alone
    rounding: float | None = None  # what it cost when it was measured last, as MergeFidelity
    left_out: dict[str, str] = field(default_factory=dict)  # layers that "all-linear" leaves out, with the reason
    started: bool = False  # initialize_from_data was called, so that a fit does not start from its own data
    values_follow: bool = False  # an adapter is loaded next, so that nothing is computed from weights for it
    passed_over: str = ""  # what "all-linear" left alone beside these: its share, and kinds of weights with theirs
    passes_over_nearly_all: bool = False  # which is to be warned of once
    root: weakref.ref[nn.Module] | None = None  # the injected module; a copy of the record does not have it
    writer: Writer = field(default_factory=Writer)  # which thread changes the model; a copy has its own

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "writer"} | {"root": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, writer=Writer())

    def begin(self, root: nn.Module) -> None:
        """Let a module hold the record as the injected one.

        Raises:
            LoRAError: it has got another one meanwhile, from another thread.
        """
        if vars(root).setdefault(ATTRIBUTE, self) is not self:
            raise LoRAError(
                f"inject: another thread has injected this {type(root).__name__} meanwhile. One thread at a time "
                "changes a model: hold one threading.Lock of your own around such calls."
            )
        self.root = weakref.ref(root)

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Change every name of the record; what has no new name is forgotten."""
        self.scope = new_name(self.scope) or ""
        self.requires_grad = rename_keys(self.requires_grad, new_name)
        self.initial = rename_keys(self.initial, new_name)
        self.left_out = rename_keys(self.left_out, new_name)
        self.trained = set(rename_keys(dict.fromkeys(self.trained), new_name))
        self.unfrozen = set(rename_keys(dict.fromkeys(self.unfrozen), new_name))
        self.resized = set(rename_keys(dict.fromkeys(self.resized), new_name))


class Injected(NamedTuple):
    """An injection as seen from the injected module, one around it or one inside; prefixes are "" or end in a dot."""

    root: nn.Module  # the injected module, which the record's names are relative to
    record: Injection
    prefix: str = ""  # what a module around the root has before the record's names
    inside: str = ""  # what the record's names have before those of a module inside the root

    def seen(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values of the record that this module holds, by its own names."""
        return {self.name_seen(name): value for name, value in values.items() if name.startswith(self.inside)}

    def scope(self) -> str:
        """Return the prefix of what the options are about, by this module's names."""
        inner = self.record.scope.startswith(self.inside)
        return self.name_seen(self.record.scope) if inner else self.prefix

    def name_seen(self, name: str) -> str:
        """Return a name of the record as a name of this module."""
        return self.prefix + name.removeprefix(self.inside)


def find_injection(model: nn.Module) -> Injected | None:
    """Return the injection of a module that holds all its adapted layers, or None.

    The injected module itself answers at once; any other module is walked.

    Raises:
        LoRAError: the module holds several injected models.
    """
    if ATTRIBUTE in vars(model):
        return Injected(model, vars(model)[ATTRIBUTE])
    roots = {canonical(name): module for name, module in model.named_modules() if ATTRIBUTE in vars(module)}
    layers = adapted_layers(model)
    records = [vars(root)[ATTRIBUTE] for root in roots.values()] + [layer.lora.injection for layer in layers.values()]
    if len({id(record) for record in records}) > 1:
        names = ", ".join(map(repr, roots or layers))
        raise LoRAError(f"{type(model).__name__}: holds several injected models ({names}); handle each by itself.")
    if roots:
        name, root = next(iter(roots.items()))
        return Injected(root, records[0], prefix=f"{name}.")
    return _find_by_layers(model, layers, records[0]) if layers else None


def require_injection(model: nn.Module, verb: str) -> Injected:
    """Return the injection of a module that holds all its adapted layers.

    Raises:
        LoRAError: there is none; the message begins with the verb.
    """
    injected = find_injection(model)
    if injected is None and adapted_layers(model):
        _refuse_part(model, verb)
    if injected is None:
        raise LoRAError(
            f"{verb}: {type(model).__name__} was not injected; call inject(model, LoRAConfig(...)) first, or pass the "
            "module that it was called on."
        )
    return injected


def _refuse_part(model: nn.Module, verb: str) -> NoReturn:
    """Refuse a module that holds a part of the layers that were adapted through one around it."""
    layers = adapted_layers(model)
    root = next(iter(layers.values())).lora.injection.root()
    all_layers = adapted_layers(root)
    other = next(name for name, layer in all_layers.items() if layer not in layers.values())
    raise LoRAError(
        f"{verb}: {type(model).__name__} holds {len(layers)} of the {len(all_layers)} layers that were adapted through "
        f"{type(root).__name__}, and not {other!r}; pass that {type(root).__name__}, or a module that holds them all."
    )


def forget_rebuilt(model: nn.Module, earlier: Set[nn.Module]) -> None:
    """Drop what was recorded of tensors in modules that are not among the earlier ones: it was of others.

    Without that, a module that is built anew would be left trainable, and have initial values of the one before it.
    """
    root, record, *_ = require_injection(model, "LoRACallback")
    rebuilt = {
        f"{canonical(path)}.{name}".lstrip(".")
        for path, module in root.named_modules()
        if module not in earlier
        for name in (*module._parameters, *module._buffers)
    }
    if rebuilt & {*record.requires_grad, *record.initial}:
        record.rename(lambda name: None if name in rebuilt else name)
        record.fingerprint = {}


def refuse_replaced_layers(model: nn.Module, verb: str, layers: Mapping[str, AdaptedWeights] | None = None) -> None:
    """Raise LoRAError for the first layer that was adapted and is not in an injected model any more.

    Args:
        model: any module; one that holds no injected model is let pass.
        verb: what the message begins with.
        layers: its adapted layers, where the caller has listed them; if none is missing, no module is visited.
    """
    if layers and _are_complete(layers.values()):
        return
    for root in _injected_modules(model):
        expected, live = vars(root)[ATTRIBUTE].layers, {layer.lora.name for layer in adapted_layers(root).values()}
        live |= {name for name, _, _ in adapted_places(root)}  # tied tables have a name each, and one adapter
        gone = [name for name in expected if name not in live]
        if gone:
            modules = {canonical(name): module for name, module in root.named_modules()}
            now = f"now a {describe_class(modules[gone[0]])}" if gone[0] in modules else "no longer there,"
            raise LoRAError(
                f"{verb}: {gone[0]!r} in {type(root).__name__} was adapted, but is {now} without an adapter "
                f"({len(gone)} of {len(expected)} adapted layers are gone). Replace or convert layers before they are "
                "adapted, in __init__, setup or configure_model, or leave them out with "
                f"exclude_modules=[{listed(list(map(repr, gone)))}]."
            )


def _are_complete(layers: Collection[AdaptedWeights]) -> bool:
    """Tell whether these are all the layers that the injections which they are from have adapted."""
    live = {(id(layer.lora.injection), layer.lora.name) for layer in layers}
    records = {id(layer.lora.injection): layer.lora.injection for layer in layers}
    return all((number, name) in live for number, record in records.items() for name in record.layers)


def _injected_modules(model: nn.Module) -> list[nn.Module]:
    """Return the injected modules in a model, or else those that it is inside of."""
    inside = [module for module in model.modules() if ATTRIBUTE in vars(module)]
    if inside:
        return inside
    records = {id(layer.lora.injection): layer.lora.injection for layer in adapted_layers(model).values()}
    roots = [record.root() for record in records.values() if record.root is not None]
    return [root for root in roots if root is not None and any(module is model for module in root.modules())]


def describe_class(module: nn.Module) -> str:
    """Return the class of a module with its module path."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _find_by_layers(model: nn.Module, layers: Mapping[str, AdaptedWeights], record: Injection) -> Injected | None:
    """For a module that does not hold the injected one: it is inside of that, or takes its place."""
    root = record.root() if record.root is not None else None
    name, layer = next(iter(layers.items()))
    if root is not None:
        if set(adapted_layers(root).values()) - set(layers.values()):
            return None
        if any(module is model for module in root.modules()):
            return Injected(root, record, inside=_without_tail(layer.lora.name, name))
        delattr(root, ATTRIBUTE)
    new_name = _renaming(layer.lora.name, name)
    held = {canonical(path) for path, _ in model.named_modules()}
    replaced = [name for name in map(new_name, record.layers) if name in held - layers.keys()]
    record.rename(new_name)
    for name, layer in layers.items():
        layer.lora.name = name
    record.layers = [*layers, *replaced]
    record.begin(model)
    return Injected(model, record)


def _renaming(name: str, new_name: str) -> Callable[[str], str | None]:
    """The change of prefix that turns `name` into `new_name`, for any name; None for one without the prefix."""
    old, new = (text.split(".") if text else [] for text in (name, new_name))
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    removed, added = ("".join(f"{segment}." for segment in segments) for segments in (old, new))
    return lambda any_name: added + any_name.removeprefix(removed) if any_name.startswith(removed) else None


def _without_tail(name: str, tail: str) -> str:
    """What a dotted name has before its tail, "" or ending in a dot."""
    return f"{name}.".removesuffix(f"{tail}." if tail else "")


def record_trainable(model: nn.Module, *, expected: bool = False) -> None:
    """Record the present value of every base parameter that has become trainable.

    Args:
        model: an injected model.
        expected: whether the options ask for it; a warning tells of anything else that was unfrozen.
    """
    injected = require_injection(model, "inject")
    record = injected.record
    new = {
        name: parameter
        for name, parameter in base_parameters(injected.root).items()
        if parameter.requires_grad and name not in record.trained
    }
    for name, parameter in new.items():
        record.trained.add(name)
        record.initial[name] = parameter.detach().clone()
    if new and not expected:
        record.unfrozen.update(new)
        shown = ", ".join(list(new)[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        warnings.warn(
            f"lightning_lora: base parameters were unfrozen after injection ({shown}); they are saved with the "
            "adapter.",
            stacklevel=2,
        )


def snapshot_initial(model: nn.Module) -> None:
    """Record the present values of what training changes; once the injection was validated, those of new names only."""
    root, record, *_ = require_injection(model, "inject")
    buffers = {id(buffer) for buffer in root.buffers()}
    earlier = record.initial if record.validated else {}
    record.initial = earlier | {
        name: tensor.detach().clone()
        for name, tensor, module in named_state(root)
        if tensor is not None and not is_factor(name, module)
        if name not in earlier and (name in record.trained or id(tensor) in buffers)
    }


def snapshot_materialised(model: nn.Module) -> None:
    """Record present values in place of those from the meta device; call before training or loading."""
    root, record, *_ = require_injection(model, "LoRACallback")
    live = {name: tensor for name, tensor, _ in named_state(root) if tensor is not None}
    for name, value in record.initial.items():
        if value.is_meta:
            record.initial[name] = live[name].detach().clone()


def record_loaded(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Record the values of a new base as those from before training, for an injected model or a part of it."""
    layers = adapted_layers(module)
    if not layers:
        return
    name, layer = next(iter(layers.items()))
    record, recorded_name = layer.lora.injection, _renaming(name, layer.lora.name)
    record.fingerprint = {}
    for seen_name, value in values.items():
        name = recorded_name(seen_name) or ""
        before = record.initial.get(name)
        if before is not None and isinstance(value, torch.Tensor) and before.shape == value.shape:
            device = value.device if before.is_meta else before.device
            record.initial[name] = value.detach().clone().to(device, before.dtype)
