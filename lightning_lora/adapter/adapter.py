"""An adapter apart from any model: its tensors, options and names; renamed, checked and measured."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mode
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch

from ..config import LoRAConfig
from ..errors import LoRAError
from ..matching import exact_key, near_misses
from ..names import PREFIX, factor_role, names_factor, parent_names, rename_keys, split_factor_name, suffixes
from ..nn.low_rank import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    MERGEABLE_DTYPES,
    SEPARATE,
    low_rank_blocks,
)
from ..nn.products import inner_of_products, product_norm
from ..nn.variant import Acting, Place, Variant, known_variants, rows_leaf, variant_of, variant_with

SAMPLES = 8  # values by which tensors are told apart before they are compared whole

NewName = Callable[[str], str | None]
Pair = tuple[torch.Tensor, torch.Tensor]
Versions = dict[str, tuple[torch.Tensor, int]]

_CHECKED: WeakKeyDictionary[Adapter, Versions] = WeakKeyDictionary()  # adapters that check_factors has let pass


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Hold tensors by this package's state dict names, and what is known of where they belong.

    read_adapter and take_adapter return it.

    Attributes:
        tensors: factors, trained parameters and buffers.
        config: the options, or None where the source holds none.
        scalings: s of each adapted layer, or empty where the source holds none.
        fingerprint: of the base, or empty where the source holds none.
        complete: the source holds buffers too, so that each missing name is an error.
        kinds: of each adapted layer where known, see low_rank.KINDS.
        tables: which rows of each table are trained, ascending, or empty where the source does not say it.
        tied: the tables that share the rows of another by a tie, each with that one's name; their rows may be left out.
        tied_by_peft: PEFT makes all these ties by itself, because transformers does.
        peft_rows: the rows were trained by PEFT, in which a head with rows has no bias.
        peft_outputs: factors of attention's out_proj are as PEFT holds them, perhaps turned; see peft_attention.py.
        after_conv1d: the names of attention's out_proj and of single parameters that PEFT reaches while its
            fan_in_fan_out is true, as their model tells, or None where that is not known.
        network: the prefix of the network's names inside the LightningModule that was saved.
        origin: what the source says of the base: base_model_name_or_path, revision, task_type.
        scope: the prefix of the part of a model that it is for, or "" for all; what the options mean outside of it, and
            buffers there, need not be here.
        fan_in_fan_out: weights of unknown kind are stored (in, out), as PEFT says of transformers' Conv1D.
        assumed_order: of parameters of one module, as far as PEFT's names were read by it and not by the model's own.
        perhaps_base: names of tensors of which only a model tells whether they are its base's or came to be otherwise.
    """

    tensors: Mapping[str, Any]
    config: LoRAConfig | None = None
    scalings: Mapping[str, float] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    scope: str = ""
    perhaps_base: frozenset[str] = frozenset()
    tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    tied_by_peft: bool = False
    peft_rows: bool = False
    peft_outputs: bool = False
    after_conv1d: frozenset[str] | None = frozenset()
    assumed_order: Sequence[Sequence[str]] = ()

    def __repr__(self) -> str:
        layers, origin = self.layers(), self.origin.get("base_model_name_or_path")
        ranks = sorted({self.variant.rank(self.stored(layer)) for layer in layers if not _fault(self, layer)})
        values = sum(value.numel() for value in self.tensors.values() if isinstance(value, torch.Tensor))
        parts = [f"r={' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"] if ranks else []
        parts += [f"{len(layers)} layer{'s' * (len(layers) != 1)}", f"{values:,} values"]
        parts += [f"base {origin!r}"] if origin else []
        return f"{type(self).__name__}({', '.join(parts)}{'' if self.config else ', without options'})"

    @cached_property
    def variant(self) -> Variant:
        """What its layers are, as the options say; without options as the names of the tensors tell."""
        if self.config is not None:
            return variant_of(self.config)
        return variant_with({leaf for names in self._names.values() for leaf in names} - {rows_leaf()})

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        """The names of an adapter's own tensors, by what they adapt (a layer, table or parameter) and leaf name."""
        names: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            place, leaf = split_factor_name(name) or ("", "")
            if leaf:
                names.setdefault(place, {})[leaf] = name
        return names

    def layers(self) -> list[str]:
        """Return the names of the adapted layers and parameters."""
        leaf = self.variant.trained[0]
        return [layer for layer, names in self._names.items() if leaf in names]

    def factor_name(self, layer: str, leaf: str) -> str:
        """Return the name of a tensor of an adapted layer or parameter, whether it is there or not."""
        names = self._names.get(layer, {})
        if leaf in names:
            return names[leaf]
        other = next(iter(names.items()), None)  # what is missing is called as the other one
        return other[1].replace(other[0], leaf) if other else f"{layer}.{leaf}".lstrip(".")

    def factor(self, layer: str, leaf: str) -> Any:
        """Return a tensor of an adapted layer or parameter by its leaf name."""
        return self.tensors[self.factor_name(layer, leaf)]

    def stored(self, layer: str) -> dict[str, Any]:
        """Return the tensors of an adapted layer or parameter that are there, by leaf name, in its variant's order."""
        names = self._names.get(layer, {})
        return {leaf: self.tensors[names[leaf]] for leaf in self.variant.leaves if leaf in names}

    def acting(self, layer: str) -> Acting:
        """Return the factors that a layer's tensors act as, without a scale of the sum with W.

        Raises:
            LoRAError: layers share tensors, and how large this one is, which tells its part of them, is not stored.
        """
        stored = self.stored(layer)
        if self.variant.shared:
            if not self.is_placed(layer):
                raise LoRAError(
                    f"adapter: {layer!r} uses a part of tensors that {self.variant.title} layers share, and the source "
                    "does not say how large the layer is. Load it onto its model in Python: load_adapter(model, path)."
                )
            stored = dict(self.variant.of_layer(stored, self.place(layer)))
        return Acting(*self.variant.acting(stored, None, self.scalings.get(layer, 1.0)))

    def is_placed(self, layer: str) -> bool:
        """Return whether what a layer adds is known: it shares no tensors, or its kind and size are known."""
        place = self.place(layer)
        return not self.variant.shared or bool(place.kind and place.shapes)

    def place(self, layer: str) -> Place:
        """Return what is known of a layer or parameter: of its kind "" and of its shapes none where they are not."""
        config = self.config or LoRAConfig()
        leaves = [layer] if self.is_parameter(layer) else [f"{layer}.{leaf}" for leaf in ("weight", *ATTENTION_WEIGHTS)]
        entries = {name.rpartition(".")[2]: self.fingerprint.get(name) for name in leaves}
        return Place(
            name=layer,
            kind=self.kinds.get(layer, ""),
            shapes={leaf: torch.Size(entry["shape"]) for leaf, entry in entries.items() if entry is not None},
            rank=config.rank(self.options_name(layer)),
            scaling=self.scalings.get(layer, 1.0),
            enabled=config.enabled_parts(layer),
            init=config.init_lora_weights,
            options=config.all_variant_options(),
        )

    @cached_property
    def parameters(self) -> list[str]:
        """The names of the parameters that are adapted by themselves."""
        return [layer for layer in self.layers() if self.is_parameter(layer)]

    def is_parameter(self, layer: str) -> bool:
        """Return whether what is adapted is a parameter by itself."""
        leaf = self.variant.trained[0]
        return self.factor_name(layer, leaf) != f"{layer}.{leaf}".lstrip(".")

    def rows(self) -> dict[str, Any]:
        """Return the trained rows of each table, by its name."""
        leaf = rows_leaf()
        return {table: self.tensors[names[leaf]] for table, names in self._names.items() if leaf in names and table}

    def beside_factors(self) -> dict[str, Any]:
        """Return what was trained whole, and buffers."""
        return {name: self.tensors[name] for name in self._whole_names}

    @cached_property
    def _whole_names(self) -> list[str]:
        return [name for name in self.tensors if not names_factor(name)]

    def ranks(self) -> dict[str, int]:
        """Return the rank of each adapted layer."""
        return {name: self.variant.rank(self.stored(name)) for name in self.layers()}

    def options_name(self, name: str) -> str:
        """Return the layer whose options a layer has in PEFT: an adapted attention's out_proj has the attention's."""
        attention, _, leaf = name.rpartition(".")
        return attention if leaf == "out_proj" and self.variant.trained[0] in self._names.get(attention, ()) else name

    def with_names(self, new_name: NewName) -> Adapter:
        """Return it with a new name for each tensor's, and its layers'; None leaves one out. The options stay."""

        def new_layer(layer: str) -> str | None:
            return _new_layer(self, layer, new_name)

        def new_table(table: str) -> str | None:
            name = new_name(f"{table}.{rows_leaf()}")
            return None if name is None else name.removesuffix(f".{rows_leaf()}")

        tied = {table: new_table(first) for table, first in self.tied.items()}
        return replace(
            self,
            tensors=rename_keys(self.tensors, new_name),
            scalings=rename_keys(self.scalings, new_layer),
            fingerprint=rename_keys(self.fingerprint, new_name),
            kinds=rename_keys(self.kinds, new_layer),
            tables=rename_keys(self.tables, new_table),
            tied=rename_keys({table: first for table, first in tied.items() if first is not None}, new_table),
            perhaps_base=frozenset(rename_keys(dict.fromkeys(self.perhaps_base), new_name)),
            after_conv1d=self.after_conv1d and frozenset(rename_keys(dict.fromkeys(self.after_conv1d), new_layer)),
        )

    def without_layers(self, layers: Collection[str]) -> Adapter:
        """Return it without some layers; the options stay."""
        left_out = set(layers)
        own = {name for layer in left_out for name in self._names.get(layer, {}).values()}
        return replace(
            self,
            tensors={name: tensor for name, tensor in self.tensors.items() if name not in own},
            scalings={name: scaling for name, scaling in self.scalings.items() if name not in left_out},
            kinds={name: kind for name, kind in self.kinds.items() if name not in left_out},
        )

    def renamed(self, strip: str, add: str) -> Adapter:
        """Return it with a dotted prefix off every name and another in front; names without it are left out.

        The options go on to mean the same layers.
        """

        def new_name(name: str) -> str | None:
            return add + name.removeprefix(strip) if name.startswith(strip) else None

        return replace(self.renamed_by(new_name), network="")

    def renamed_by(self, new_name: NewName) -> Adapter:
        """Return it with new names as with_names does; the options go on to mean the same layers."""
        new = replace(self.with_names(new_name), scope=new_name(self.scope) or "")
        old_layers = {_new_layer(self, layer, new_name): layer for layer in self.layers()}
        return replace(new, config=_translate_config(self, new, old_layers))

    def by_network_names(self) -> Adapter:
        """Return it under the network's own names, without tensors outside of that."""
        return self.renamed(self.network, "") if self.network else self


def _new_layer(adapter: Adapter, layer: str, new_name: NewName) -> str | None:
    parts = split_factor_name(new_name(adapter.factor_name(layer, adapter.variant.trained[0])) or "")
    return parts[0] if parts else None


def _translate_config(old: Adapter, new: Adapter, old_layers: Mapping[str | None, str]) -> LoRAConfig | None:
    """Return the options for the new names: as they are where they mean the same, else with the layers spelled out.

    Args:
        old: the adapter before it was renamed.
        new: the adapter after.
        old_layers: the old name of each new one.
    """
    if old.config is None:
        return None
    modules = {module for name in new.tensors for module in parent_names(name)}
    named = {suffix for module in modules for suffix in suffixes(module)}
    saved = [  # without what was taken off the names, where an entry needs that to name anything
        entry if entry in named else next((tail for tail in suffixes(entry) if tail in modules), entry)
        for entry in old.config.modules_to_save or ()
    ]
    config = replace(old.config, modules_to_save=saved)
    enabled = {layer: config.enabled_parts(old_layers[layer]) for layer in new.layers()}
    same_parts = all(config.enabled_parts(layer) == parts for layer, parts in enabled.items())
    if same_parts and options_hold(config, new.ranks(), new.scalings):
        return config
    longest_first = sorted(enabled.items(), key=lambda item: -len(item[0]))
    exact = exact_options(config, new.ranks(), new.scalings, new.parameters)
    return replace(exact, enable_lora={layer: parts for layer, parts in longest_first if parts})


def options_hold(config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> bool:
    """Tell whether options give the layers in `ranks` these ranks and scalings."""
    return all(config.rank(n) == r and math.isclose(config.scaling(n), scalings[n]) for n, r in ranks.items())


def exact_options(
    config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float], parameters: Collection[str] = ()
) -> LoRAConfig:
    """Return the options changed to give exactly the layers and parameters in `ranks` these ranks and scalings.

    What most layers have is the option, and patterns name the others.
    """
    return replace(
        with_exact_ranks(config, ranks, scalings),
        target_modules=[name for name in ranks if name not in parameters],
        target_parameters=list(parameters),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def with_exact_ranks(config: LoRAConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> LoRAConfig:
    """Return the options changed to give the layers in `ranks` these ranks and scalings; they name the same layers."""
    alphas = {n: scalings[n] * (math.sqrt(r) if config.use_rslora else r) for n, r in ranks.items()}
    alphas = {n: int(alpha) if alpha == int(alpha) else alpha for n, alpha in alphas.items()}
    common_r, common_alpha = mode(ranks.values()), mode(alphas.values())
    return replace(
        config,
        r=common_r,
        lora_alpha=common_alpha,
        rank_pattern={exact_key(n): r for n, r in ranks.items() if r != common_r},
        alpha_pattern={exact_key(n): alpha for n, alpha in alphas.items() if alpha != common_alpha},
    )


def with_aliases(config: LoRAConfig, aliases: Mapping[str, str]) -> LoRAConfig:
    """Return the options changed to give a layer's other names what they give the first, by which it is adapted.

    Args:
        config: the options.
        aliases: the first name, by each other one.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parts: dict[str, Sequence[bool]] = {}
    for alias, first in aliases.items():
        key = exact_key(alias)
        if config.rank(alias) != config.rank(first):
            ranks[key] = config.rank(first)
        if config.alpha(alias) != config.alpha(first):
            alphas[key] = config.alpha(first)
        if config.enabled_parts(alias) != config.enabled_parts(first):
            parts[alias] = config.enabled_parts(first) or (True,)
    return replace(
        config,
        rank_pattern={**ranks, **(config.rank_pattern or {})},
        alpha_pattern={**alphas, **(config.alpha_pattern or {})},
        enable_lora={**parts, **(config.enable_lora or {})},
    )


def without_aliases(config: LoRAConfig, aliases: Collection[str]) -> LoRAConfig:
    """Undo with_aliases: what the options say of other names than the first means nothing to a model."""
    keys = {*aliases, *map(exact_key, aliases)}

    def kept(option: Mapping[str, Any] | None) -> dict[str, Any]:
        return {key: value for key, value in (option or {}).items() if key not in keys}

    return replace(
        config,
        rank_pattern=kept(config.rank_pattern),
        alpha_pattern=kept(config.alpha_pattern),
        enable_lora=kept(config.enable_lora),
    )


def align_to_modules(adapter: Adapter, modules: Set[str], where: str) -> Adapter:
    """Return the adapter under the one prefix at which its layers are among the modules.

    Raises:
        LoRAError: there is no such prefix, or there are several.
    """
    layers = adapter.layers()
    if not layers:
        raise LoRAError(
            f"adapter: the source holds {nothing_adapted(adapter)}; it is not an adapter of a known format."
        )
    if all(layer in modules for layer in layers):
        return adapter
    prefixes = _fitting_prefixes(layers, modules)
    if len(prefixes) != 1 and adapter.network:
        return align_to_modules(adapter.by_network_names(), modules, where)
    if len(prefixes) != 1:
        fitting = ", ".join(repr(add or f"without {strip}") for strip, add in prefixes) or "none"
        unplaced = next(layer for layer in layers if layer not in modules)
        raise LoRAError(
            f"adapter: its layers ({unplaced!r}, ...) must fit {where} under exactly one prefix; "
            f"found {fitting}{near_misses(unplaced, modules - {''})}. Pass the submodule that the adapter is for."
        )
    strip, add = prefixes[0]
    outside = [name for name in adapter.tensors if not name.startswith(strip)]
    if outside and strip != adapter.network:  # a network by itself has no use for what lies around it
        warnings.warn(
            f"lightning_lora: {len(outside)} of the adapter's tensors lie outside {where} and are left out, "
            f"first {outside[0]!r}.",
            stacklevel=4,
        )
    return adapter.renamed(strip, add)


def _fitting_prefixes(layers: Sequence[str], modules: Set[str]) -> list[tuple[str, str]]:
    """List each (prefix to strip, prefix to add), of which one is empty, that makes every layer a module."""
    first = layers[0].split(".")
    strips = [".".join(first[:i]) + "." for i in range(1, len(first))]
    strips = [strip for strip in strips if all(f"{layer}.".startswith(strip) for layer in layers)]
    strips = [s for s in strips if all(f"{layer}."[len(s) :].removesuffix(".") in modules for layer in layers)]
    adds = sorted({module.removesuffix(layers[0]) for module in modules if module.endswith(f".{layers[0]}")})
    adds = [add for add in adds if all(add + layer in modules for layer in layers)]
    return [(strip, "") for strip in strips] + [("", add) for add in adds]


def nothing_adapted(adapter: Adapter) -> str:
    """Say what an adapter without an adapted layer lacks, for messages: it may be of a variant that is unknown here."""
    leaves = {name: name.rpartition(".")[2] for name in adapter.tensors}
    unknown = [name for name, leaf in leaves.items() if leaf.startswith(PREFIX) and not names_factor(name)]
    if unknown:
        return (
            f"{unknown[0]!r}, a tensor of no variant that is known here ({', '.join(known_titles())}): import the file "
            "that defines its variant before loading"
        )
    return f"no {adapter.variant.trained[0]}"


def known_titles() -> list[str]:
    """Return how the known variants are called."""
    return list(dict.fromkeys(variant.title for variant in known_variants() if variant.name))


def check_factors(adapter: Adapter, where: str) -> None:
    """Raise LoRAError for the first layer whose tensors are not finite, or not as its variant and the options say."""
    for layer in adapter._names:
        _refuse_fault(adapter, layer, where)
    for table, rows in adapter.rows().items():
        _check_rows(adapter, table, rows, where)
    refuse_nested(adapter.beside_factors(), where)


def _refuse_fault(adapter: Adapter, layer: str, where: str) -> None:
    names, variant = adapter._names[layer], adapter.variant
    rows = rows_leaf()
    own = {leaf: name for leaf, name in names.items() if leaf != rows}
    if not layer:
        raise LoRAError(f"{where}: {next(iter(names.values()))!r} names no layer.")
    if not own:
        return
    unexpected = next((leaf for leaf in own if leaf not in variant.leaves), None)
    if unexpected is not None:
        raise LoRAError(
            f"{where}: {own[unexpected]!r} is of no adapted layer, or {_asked_by(variant_with({unexpected}))} is "
            "missing in the options; the file is damaged."
        )
    fault = _fault(adapter, layer)
    if fault:
        raise LoRAError(f"{where}: {fault}")
    for leaf, value in adapter.stored(layer).items():
        check_finite(names[leaf], value, where)
    _check_rank(adapter, layer, where)


def _asked_by(variant: Variant) -> str:
    return ", ".join(f"{option}={json.dumps(value)}" for option, value in variant.options().items())


def _fault(adapter: Adapter, layer: str) -> str:
    """Say which tensor of a layer is missing or does not go with the others, or return ""."""
    stored, variant = adapter.stored(layer), adapter.variant
    for leaf in variant.leaves:
        name = adapter.factor_name(layer, leaf)
        if leaf not in stored:
            return f"{name!r} is missing; the adapter was cut."
        if not _holds_numbers(stored[leaf]):
            return f"{name!r} must be a floating point tensor, found {describe_value(stored[leaf])}."
    problem = variant.fault(stored)
    if problem is None:
        return ""
    if problem.leaf:
        found = describe_value(stored[problem.leaf])
        return f"{adapter.factor_name(layer, problem.leaf)!r} must be {problem.text}, found {found}."
    return f"{layer!r}: {problem.text}."


def check_once(adapter: Adapter, where: str) -> None:
    """Do check_factors, unless that was done for this very adapter and nothing was written into its tensors since."""
    now = _versions(adapter)
    if now is None or not _are_same(now, _CHECKED.get(adapter)):
        check_factors(adapter, where)
        if now is not None:
            _CHECKED[adapter] = now


def _versions(adapter: Adapter) -> Versions | None:
    """Return the tensors, and how often each was written to; None where one does not count that (inference mode)."""
    tensors = {name: value for name, value in adapter.tensors.items() if isinstance(value, torch.Tensor)}
    if any(map(torch.Tensor.is_inference, tensors.values())):
        return None
    return {name: (tensor, tensor._version) for name, tensor in tensors.items()}


def _are_same(now: Versions, before: Versions | None) -> bool:
    return (
        before is not None
        and now.keys() == before.keys()
        and all(tensor is before[name][0] and version == before[name][1] for name, (tensor, version) in now.items())
    )


def refuse_nested(tensors: Mapping[str, Any], where: object) -> None:
    """Raise LoRAError for the first nested tensor, which has no shape that could be compared with anything."""
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and value.is_nested:
            raise LoRAError(f"{where}: {name!r} must be a tensor of one shape, found {describe_value(value)}.")


def is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a tensor whose numbers lie in memory side by side, neither sparse nor nested."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested


def _holds_numbers(value: Any) -> TypeGuard[torch.Tensor]:
    return is_plain(value) and value.dtype in MERGEABLE_DTYPES


def describe_value(value: object) -> str:
    """Return what a value is, for messages."""
    if not isinstance(value, torch.Tensor):
        return f"{value!r:.80}"
    if not is_plain(value):
        return "a nested tensor" if value.is_nested else f"a tensor of the layout {value.layout}"
    return f"{value.dtype} {tuple(value.shape)}" + (" without values, on the meta device" if value.is_meta else "")


def require_values(adapter: Adapter, where: str) -> None:
    """Raise LoRAError where a tensor of an adapter that is on disk is on the meta device."""
    for name, value in adapter.tensors.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise LoRAError(f"{where}: {name!r} has no values: it was saved from the meta device.")


def _check_rows(adapter: Adapter, table: str, rows: Any, where: str) -> None:
    """Raise LoRAError where a table's trained rows are no finite matrix of as many rows as are named."""
    name, numbers = f"{table}.{rows_leaf()}", adapter.tables.get(table)
    if not _holds_numbers(rows) or rows.dim() != 2:
        raise LoRAError(f"{where}: {name!r} must be a floating point matrix of rows, found {describe_value(rows)}.")
    if numbers is not None and len(numbers) != len(rows):
        raise LoRAError(f"{where}: {name!r} has {len(rows)} rows, but {len(numbers)} are named: the file is damaged.")
    check_finite(name, rows, where)


def _check_rank(adapter: Adapter, name: str, where: str) -> None:
    """Raise LoRAError where the options say another rank or scaling of a layer."""
    if adapter.config is None:
        return
    stored = adapter.stored(name)
    rank = adapter.variant.rank(stored)
    with_options = dict.fromkeys((name, adapter.options_name(name)))
    scalings = [adapter.config.scaling(n) for n in with_options if adapter.config.rank(n) == rank]
    if not scalings:
        shapes = ", ".join(f"{factor_role(leaf)} {tuple(stored[leaf].shape)}" for leaf in adapter.variant.trained)
        raise LoRAError(
            f"{where}: {name!r}: the options say r={adapter.config.rank(name)}, but its factors have rank {rank}: "
            f"{shapes}."
        )
    recorded = adapter.scalings.get(name, scalings[0])
    if not any(math.isclose(recorded, scaling) for scaling in scalings):
        raise LoRAError(
            f"{where}: {name!r}: the options say a scaling (lora_alpha over r) of {scalings[0]:g}, but {recorded:g} is "
            "recorded; the file is damaged."
        )


def check_finite(name: str, value: torch.Tensor, where: str = "adapter") -> None:
    """Raise LoRAError where a tensor holds NaN or Inf; one without values (meta) counts as finite."""
    if not value.is_meta and not _is_finite(value.detach()):
        raise LoRAError(f"{where}: {name!r} holds NaN or Inf; it comes from a diverged run or a damaged file.")


def _is_finite(value: torch.Tensor) -> bool:
    numbers = value if value.dtype in MERGEABLE_DTYPES else value.double()  # isfinite does not know float8
    wide = torch.promote_types(numbers.dtype, torch.float32)
    # One pass: a sum with NaN or Inf in it is not finite. Finite values whose sum is beyond the range are rare.
    return math.isfinite(numbers.sum(dtype=wide).item()) or bool(torch.isfinite(numbers).all())


def equal_tables(tensors: Mapping[str, Any]) -> list[set[str]]:
    """Return the names of tensors of two dimensions or more that are there under several, bit for bit, by group."""
    alike: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.numel() and not tensor.is_meta:
            values = tensor.detach().reshape(-1)[:: max(tensor.numel() // SAMPLES, 1)].tolist()
            alike.setdefault((tensor.dtype, tensor.shape, *values), []).append(name)
    groups = []
    for names in alike.values():
        while len(names) > 1:
            group = {other for other in names if torch.equal(tensors[names[0]], tensors[other])} | {names[0]}
            groups.append(group)
            names = [name for name in names if name not in group]
    return [group for group in groups if len(group) > 1]


def ties_of(names: Set[str], tensors: Mapping[str, Any]) -> set[str]:
    """Return the names of the other tables that equal one of these: the other ends of ties."""
    return {name for group in equal_tables(tensors) if group & names for name in group - names}


def delta_norm(adapter: Adapter, name: str) -> float:
    """Return the Frobenius norm of s * B @ A of one layer; without options, of B @ A. A scale does not count."""
    return math.hypot(*(product_norm(left, right) for left, right in scaled_pairs(adapter, name)))


def difference_norm(adapter: Adapter, other_adapter: Adapter, name: str) -> float:
    """Return the Frobenius norm of the difference between two adapters' s * B @ A of one layer.

    Raises:
        ValueError: the layer has other parts or shapes in the two.
    """
    norms = []
    for (left, right), (other_left, other_right) in _matching_pairs(adapter, other_adapter, name):
        if left.shape == other_left.shape and torch.equal(left, other_left) and torch.equal(right, other_right):
            norms.append(0.0)
        else:
            norms.append(product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right])))
    return math.hypot(*norms)


def cosine(adapter: Adapter, other_adapter: Adapter, name: str) -> float:
    """Return the cosine between two adapters' s * B @ A of one layer, seen as vectors; NaN where one is zero.

    Raises:
        ValueError: the layer has other parts or shapes in the two.
    """
    inner = sum(
        float(inner_of_products(*pair, *other_pair))
        for pair, other_pair in _matching_pairs(adapter, other_adapter, name)
    )
    norms = delta_norm(adapter, name) * delta_norm(other_adapter, name)
    value = inner / norms if norms else math.nan
    return max(-1.0, min(1.0, value)) if math.isfinite(value) else math.nan


def _matching_pairs(adapter: Adapter, other_adapter: Adapter, name: str) -> list[tuple[Pair, Pair]]:
    """The scaled_pairs of one layer in two adapters, side by side; ValueError where they do not go together."""
    both = adapter, other_adapter
    enabled = [each.config.enabled_parts(name) if each.config else None for each in both]
    pairs, other_pairs = (scaled_pairs(each, name) for each in both)
    if len(pairs) != len(other_pairs) or (None not in enabled and enabled[0] != enabled[1]):
        raise ValueError(f"{name!r} has other parts in the two")
    matching = list(zip(pairs, other_pairs, strict=True))
    for (left, right), (other_left, other_right) in matching:
        if left.shape[0] != other_left.shape[0] or right.shape[1] != other_right.shape[1]:
            raise ValueError(f"{name!r} has other shapes in the two")
    return matching


def separate_shapes(adapter: Adapter, name: str) -> dict[str, Sequence[int]]:
    """Return the shapes of q, k and v's weights where a layer is attention that has them apart, else none."""
    if adapter.kinds.get(name) != ATTENTION:
        return {}
    entries = {leaf: adapter.fingerprint.get(f"{name}.{leaf}") for leaf in SEPARATE}
    return {leaf: entry["shape"] for leaf, entry in entries.items() if entry is not None}


def scaled_pairs(adapter: Adapter, name: str) -> list[Pair]:
    """Return (s * B, A) of each part of a layer (an expert, an adapted part; q, k, v), as matrices in float64.

    s is 1 where the source does not hold it.

    Raises:
        LoRAError: the factors do not fit each other.
    """
    a, b, _ = adapter.acting(name)
    a, b = (factor.detach().double().flatten(1) for factor in (a, b))
    scaling, shapes = adapter.scalings.get(name, 1.0), separate_shapes(adapter, name)
    if shapes:
        enabled = adapter.config.enabled_parts(name) if adapter.config else None
        blocks = low_rank_blocks(ATTENTION, shapes, a, b, enabled)
        return [(block.left * scaling, block.right) for parts in blocks.values() for block in parts]
    parts = a.shape[0] // b.shape[1]
    if a.shape[0] % b.shape[1] or not parts or b.shape[0] % parts:
        raise LoRAError(
            f"adapter: the factors of {name!r} do not fit each other: lora_A has {a.shape[0]} rows, and lora_B "
            f"{b.shape[0]} rows of {b.shape[1]} values. The file is damaged."
        )
    return [(left * scaling, right) for left, right in zip(b.chunk(parts), a.chunk(parts), strict=True)]
