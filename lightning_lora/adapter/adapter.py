"""An adapter apart from any model: its tensors, its options, and what is known of the layers that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..config import LoRAConfig
from ..names import PREFIX, factor_role, join_names, names_factor, parent_names, rename_keys, split_factor_name
from ..nn.attached_factors import Attachment
from ..nn.foreign_entries import ForeignEntries
from ..nn.low_rank import IN_PROJ
from ..nn.variant import EffectiveFactors, LayerInfo, Variant, known_variants, rows_leaf, variant_of, variant_with
from .values import describe_value, holds_numbers

NewName = Callable[[str], str | None]


@dataclass(frozen=True)
class Layer:
    """What is known of one adapted layer or parameter.

    Attributes:
        r: the rank, that of its tensors; 0 where they are damaged.
        scaling: s, or None where the source does not hold it.
        kind: one of low_rank.KINDS, or "" where the source does not tell it.
        parts: which equal parts of a fused projection are adapted; None for a layer that is adapted as one.
    """

    r: int = 0
    scaling: float | None = None
    kind: str = ""
    parts: tuple[bool, ...] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Hold an adapter's tensors by name, with its options and what is known of its layers and its base.

    Names are those of this package's state dicts. read_adapter and take_adapter return an Adapter.

    The layers are the truth. The options are those of the run that trained the adapter. They tell the variant, how
    A and B started, dropout and dtype, and by modules_to_save, task_type and bias what was fully trained. The rest is
    only shown, and selects nothing.

    Attributes:
        tensors: factors, trained parameters and buffers.
        base: whole tensors that a PEFT folder has beside the adapter, and that nothing says were trained. They are the
            base's, or those of a resized table: only a model tells, see align.split_off_base. They have entries in the
            fingerprint.
        layers: each adapted layer and parameter, in the order of the tensors. Left out, they are those that the tensors
            have; see with_layers.
        config: the options, or None where the source holds none.
        fingerprint: an entry for each frozen parameter of the base, or empty where the source holds none.
        complete: the source holds buffers too. A name of the model that is missing in it is an error.
        tables: the numbers of the trained rows of each table, ascending, or empty where the source does not tell them.
        tied: the name of the first table of each tied table, which has the same rows. A tied table may lack its rows.
        tied_by_peft: PEFT makes all these ties by itself, because transformers does.
        peft_version: of the PEFT that trained the adapter, "" where it is not known, and None of this package's own.
            What some tensors of PEFT's mean depends on it and on the model; see peft_parameters.py,
            peft_equivalents.py and peft_rows.py.
        network: the prefix of the network's names inside the LightningModule that was saved.
        pretrained: the prefix of the transformers model in a LightningModule, where something outside of that model was
            trained too, such as a head, so far as known. Else "".
        origin: what the source says of the base: base_model_name_or_path, revision, task_type.
        scope: the prefix of the part of a model that was injected, or "" for all of it. Layers and buffers outside of
            that part are not missing here.
        fan_in_fan_out: weights of unknown kind are stored (in, out), as PEFT says of transformers' Conv1D.
        weightless: the names of modules without weights that end like an adapted layer's name, so far as known.
            target_modules that name layers by their ends must not take these.
        foreign: what modules wrote into state_dict() beside parameters, buffers and extra state.
        attached: by name, strength and fingerprint of each frozen adapter that it was trained with. Their tensors are
            not in it, and the model that it belongs to has them attached.
        lacking: the names of such frozen adapters, of a state dict that says nothing else of them.
    """

    tensors: Mapping[str, Any]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    config: LoRAConfig | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    network: str = ""
    pretrained: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    scope: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    tied_by_peft: bool = False
    peft_version: str | None = None
    weightless: frozenset[str] = frozenset()
    foreign: ForeignEntries = field(default_factory=ForeignEntries)
    attached: Mapping[str, Attachment] = field(default_factory=dict)
    lacking: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", _layers_in_tensors(self, {}))

    def __repr__(self) -> str:
        layers, origin = self.layers, self.origin.get("base_model_name_or_path")
        ranks = sorted({layer.r for layer in layers.values() if layer.r})
        tensors = (*self.factors(), *self.whole_tensors().values())
        values = sum(value.numel() for value in tensors if isinstance(value, torch.Tensor))
        parts = [f"r={' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"] if ranks else []
        parts += [f"{len(layers)} layer{'s' * (len(layers) != 1)}", f"{values:,} values"]
        parts += [f"base {origin!r}"] if origin else []
        parts += [f"attached {strengths_text(self.attached)}"] if self.attached else []
        return f"{type(self).__name__}({', '.join(parts)}{'' if self.config else ', without options'})"

    @cached_property
    def variant(self) -> Variant:
        """The variant of its layers, by its options; without options, by the names of its tensors."""
        if self.config is not None:
            return variant_of(self.config)
        return variant_with({leaf for names in self.own_names.values() for leaf in names} - {rows_leaf()})

    @cached_property
    def own_names(self) -> dict[str, dict[str, str]]:
        """The names of the tensors that adapt something, by layer, table or parameter, and then by leaf name."""
        names: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            layer, leaf = split_factor_name(name) or ("", "")
            if leaf:
                names.setdefault(layer, {})[leaf] = name
        return names

    def with_layers(self, known: Mapping[str, Layer] | None = None) -> Adapter:
        """Return the adapter with the layers, and their ranks, that its tensors have.

        Args:
            known: what is known of layers beside their ranks; by default what the adapter knows.
        """
        return replace(self, layers=_layers_in_tensors(self, self.layers if known is None else known))

    def with_kinds(self, kinds: Mapping[str, str]) -> Adapter:
        """Return the adapter with other kinds of the layers that `kinds` names."""
        layers = {name: replace(layer, kind=kinds.get(name, layer.kind)) for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def of_kind(self, *kinds: str) -> list[str]:
        """Return the names of the layers of these kinds."""
        return [name for name, layer in self.layers.items() if layer.kind in kinds]

    def scaling(self, layer: str) -> float:
        """Return s of a layer, or 1 where the source does not hold it."""
        scaling = self.layers[layer].scaling
        return 1.0 if scaling is None else scaling

    def factor_name(self, layer: str, leaf: str) -> str:
        """Return the name of a tensor of an adapted layer or parameter, whether it is there or not."""
        names = self.own_names.get(layer, {})
        if leaf in names:
            return names[leaf]
        if not names:
            return join_names(layer, leaf)
        other, name = next(iter(names.items()))  # a missing tensor is named like one that is there
        path, dot, last = name.rpartition(".")
        return path + dot + leaf + last.removeprefix(other)

    def factor(self, layer: str, leaf: str) -> Any:
        """Return a tensor of an adapted layer or parameter by its leaf name."""
        return self.tensors[self.factor_name(layer, leaf)]

    def stored(self, layer: str) -> dict[str, Any]:
        """Return the tensors of a layer or parameter by leaf name, in its variant's order; some may be missing."""
        names = self.own_names.get(layer, {})
        return {leaf: self.tensors[names[leaf]] for leaf in self.variant.leaves if leaf in names}

    def effective_factors(self, layer: str) -> EffectiveFactors:
        """Return the factors that a layer's tensors act as. A scale that is computed from W is left out."""
        return self.variant.effective_factors_exactly(self.stored(layer), None, self.scaling(layer))

    def weight_names(self, layer: str) -> list[str]:
        """Return the names that the weight of a layer may have in the base; a parameter has one."""
        return [layer] if self.is_parameter(layer) else [f"{layer}.weight", f"{layer}.{IN_PROJ}"]

    def layer_info(self, layer: str) -> LayerInfo:
        """Return what is known of a layer or parameter. An unknown kind is "", and an unknown shape empty."""
        config = self.config or LoRAConfig()
        names = [name for name in self.weight_names(layer) if name in self.fingerprint]
        shape = self.fingerprint[names[0]].shape if names else ()
        known = self.layers[layer]
        return LayerInfo(
            name=layer,
            kind=known.kind,
            shape=torch.Size(shape),
            rank=known.r,
            scaling=self.scaling(layer),
            enabled=known.parts,
            init=config.init_lora_weights,
            options=config.all_variant_options(),
        )

    @cached_property
    def parameters(self) -> list[str]:
        """The names of the parameters that are adapted by themselves."""
        return [layer for layer in self.layers if self.is_parameter(layer)]

    @cached_property
    def modules(self) -> set[str]:
        """The names of the base's modules, as far as known: around its tensors, around frozen ones, and weightless."""
        around = {module for name in (*self.tensors, *self.fingerprint) for module in parent_names(name)}
        return around | self.weightless

    @cached_property
    def module_layers(self) -> list[str]:
        """The names of the adapted layers that are modules."""
        parameters = set(self.parameters)
        return [layer for layer in self.layers if layer not in parameters]

    def is_parameter(self, layer: str) -> bool:
        """Return whether the name is that of a parameter that is adapted by itself, and not of a layer."""
        leaf = self.variant.trained[0]
        return self.factor_name(layer, leaf) != join_names(layer, leaf)

    def factors(self) -> list[Any]:
        """Return the tensors that adapt something, trained rows too."""
        return [self.tensors[name] for names in self.own_names.values() for name in names.values()]

    def rows(self) -> dict[str, Any]:
        """Return the trained rows of each table, by its name."""
        leaf = rows_leaf()
        return {table: self.tensors[names[leaf]] for table, names in self.own_names.items() if leaf in names and table}

    def whole_tensors(self) -> dict[str, Any]:
        """Return what was fully trained, and buffers."""
        return {name: self.tensors[name] for name in self._whole_names}

    @cached_property
    def _whole_names(self) -> list[str]:
        return [name for name in self.tensors if not names_factor(name)]

    def options_name(self, name: str) -> str:
        """Return the layer whose options PEFT uses: for out_proj the attention, if that is adapted; else `name`."""
        attention, _, leaf = name.rpartition(".")
        is_adapted = self.variant.trained[0] in self.own_names.get(attention, ())
        return attention if leaf == "out_proj" and is_adapted else name

    def with_names(self, new_name: NewName) -> Adapter:
        """Return the adapter with new names for its tensors and layers. The options stay.

        Args:
            new_name: gives the new name of a tensor, or None to leave the tensor out.
        """

        def new_table(table: str) -> str | None:
            name = new_name(f"{table}.{rows_leaf()}")
            return None if name is None else name.removesuffix(f".{rows_leaf()}")

        tied = {table: new_table(first) for table, first in self.tied.items()}
        return replace(
            self,
            tensors=rename_keys(self.tensors, new_name),
            layers=rename_keys(self.layers, lambda layer: new_layer(self, layer, new_name)),
            fingerprint=rename_keys(self.fingerprint, new_name),
            tables=rename_keys(self.tables, new_table),
            tied=rename_keys({table: first for table, first in tied.items() if first is not None}, new_table),
            base=rename_keys(self.base, new_name),
            weightless=frozenset(rename_keys(dict.fromkeys(self.weightless), new_name)),
            foreign=self.foreign.with_names(new_name),
        )

    def without_layers(self, layers: Collection[str]) -> Adapter:
        """Return the adapter without some layers. The options stay."""
        left_out = set(layers)
        own = {name for layer in left_out for name in self.own_names.get(layer, {}).values()}
        return replace(
            self,
            tensors={name: tensor for name, tensor in self.tensors.items() if name not in own},
            layers={name: layer for name, layer in self.layers.items() if name not in left_out},
        )


def _layers_in_tensors(adapter: Adapter, known: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers that an adapter's tensors have, with their ranks, and with what is known of them beside."""
    leaf = adapter.variant.trained[0]
    names = [name for name, own in adapter.own_names.items() if leaf in own]
    return {name: replace(known.get(name, Layer()), r=_stored_rank(adapter, name)) for name in names}


def _stored_rank(adapter: Adapter, layer: str) -> int:
    stored = adapter.stored(layer)
    if len(stored) < len(adapter.variant.leaves) or not all(map(holds_numbers, stored.values())):
        return 0
    try:
        return adapter.variant.rank(stored)
    except (IndexError, RuntimeError):  # of torch, for shapes that no product takes
        return 0


def strengths_text(attached: Mapping[str, Attachment]) -> str:
    """Return the names and strengths of attached adapters, for messages."""
    return ", ".join(f"{name!r} (strength {each.strength:g})" for name, each in sorted(attached.items()))


def is_head_only(adapter: Adapter) -> bool:
    """Return whether its options name no layer, so that it holds what is fully trained, or rows of tables, alone."""
    return not adapter.layers and adapter.config is not None and adapter.config.names_no_layer


def saved_modules(adapter: Adapter) -> list[str]:
    """Return the modules whose weights are in an adapter whole, for one without options."""
    whole = sorted(adapter.whole_tensors())
    modules = dict.fromkeys(name.rpartition(".")[0] for name in whole if name.endswith(".weight"))
    return [module for module in modules if module not in adapter.layers]


def new_layer(adapter: Adapter, layer: str, new_name: NewName) -> str | None:
    """Return the new name of a layer whose tensors get new names; None where its tensors are left out."""
    factor = adapter.factor_name(layer, adapter.variant.trained[0])
    parts = split_factor_name(new_name(factor) or "")
    return parts[0] if parts else None


def layer_fault(adapter: Adapter, layer: str) -> str:
    """Say which tensor of a layer is missing or does not go with the others, or return ""."""
    stored = adapter.stored(layer)
    for leaf in adapter.variant.leaves:
        name = adapter.factor_name(layer, leaf)
        if leaf not in stored:
            return f"{name!r} is missing; the adapter was cut."
        if not holds_numbers(stored[leaf]):
            return f"{name!r} must be a floating point tensor, found {describe_value(stored[leaf])}."
    why_not = _why_not_together(adapter.variant, stored)
    return f"{layer!r}: {why_not}." if why_not else ""


@torch.no_grad()
def _why_not_together(variant: Variant, stored: Mapping[str, torch.Tensor]) -> str:
    """Return why the shapes of a layer's tensors do not go together, or ""."""
    shapes = " and ".join(f"{factor_role(leaf)} {tuple(tensor.shape)}" for leaf, tensor in stored.items())
    try:
        a, b, _ = variant.effective_factors_exactly(stored, None, 1.0)
    except (RuntimeError, IndexError):  # of torch, for shapes that no product takes
        return f"{shapes} do not go together"
    if a.dim() < 2 or a.dim() != b.dim() or any(size != 1 for size in b.shape[2:]):
        return f"{shapes} are no pair: both must be matrices, or those of a convolution, where B has a kernel of size 1"
    if not b.shape[1] or not a.shape[0] or a.shape[0] % b.shape[1]:
        return f"{shapes} do not share a rank"
    return ""


def nothing_adapted(adapter: Adapter) -> str:
    """Say, for messages, why an adapter has no adapted layer: nothing is adapted, or its variant is not known here."""
    leaves = {name: name.rpartition(".")[2] for name in adapter.tensors}
    unknown = [name for name, leaf in leaves.items() if leaf.startswith(PREFIX) and not names_factor(name)]
    if unknown:
        titles = dict.fromkeys(variant.title for variant in known_variants() if variant.name)
        return (
            f"{unknown[0]!r}, a tensor of no variant that is known here ({', '.join(titles)}): import the file that "
            "defines its variant before loading"
        )
    if is_head_only(adapter):
        return "fully trained modules, and no adapted layer"
    return f"no {adapter.variant.trained[0]}"
