"""PEFT's tensors as an adapter: the same steps in the same order for a folder, a lone file and a state dict.

Sources differ in how much they tell beside their tensors. A Source holds that:

    description           in the header of a file that this package wrote: words, kinds, fingerprint
    options               adapter_config.json
    nothing               ranks are in the shapes; scalings have to come from an injected model

adapter_config.json is read whoever wrote it, as PEFT reads it alone: its variant, scalings, dropout and rows count, and
a rank must be that of the tensors. The description adds what PEFT does not know: kinds of layers, enable_lora, start
factors, fingerprint. What selects layers and modules in the JSON is passed over, because the tensors name them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from ..adapter.adapter import Adapter
from ..adapter.checks import check_factors
from ..adapter.fingerprint import fingerprint_entries
from ..adapter.metadata import from_metadata, without
from ..adapter.values import refuse_nested
from ..config import LoRAConfig, options_that_decide
from ..errors import LoRAError, shown
from ..matching import exact_key, pattern_matches
from ..names import A, B, parent_names
from ..nn.variant import Variant
from .equal_tables import ties_of
from .peft_attention import refuse_file_beside_conv1d
from .peft_equivalents import idle_attention, with_enable_lora
from .peft_forms import config_in_peft, from_peft_form
from .peft_kinds import kinds_of
from .peft_names import PeftNames, read_names
from .peft_options import options_from_peft, origin_of, with_ranks_in_words
from .peft_parameters import (
    Nesting,
    Order,
    nesting_in_peft,
    nesting_of_metadata,
    usual_order,
)
from .peft_rows import rows_from_peft
from .peft_saved_modules import entries_in
from .peft_stacks import stacks_from_peft, with_kinds_of_stacks

IDLE = "idle"  # in the description: the attention layers that add_idle_attention added

REPEATED_GROUP = re.compile(r"\)[*+{]")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, which training changes

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """What is known of PEFT's tensors beside names and values.

    Attributes:
        where: the file or folder, for messages.
        options_path: adapter_config.json, for messages.
        options: its fields, as a peft.LoraConfig has them.
        variant: the variant of the options.
        description: what this package wrote into the header of the tensor file.
        order: the order in which modules register parameters. Only the model tells it.
    """

    where: object
    options_path: Path | None = None
    options: Mapping[str, Any] | None = None
    variant: Variant | None = None
    description: Mapping[str, Any] | None = None
    order: Order = usual_order

    def nesting(self, wrapped: Mapping[str, int]) -> Nesting:
        """Return which parameters the adapters of each module belong to, given how many adapters it has."""
        if self.description is not None:
            return nesting_of_metadata(self.description, self.where)
        if self.options is not None:
            return nesting_in_peft(self.options, wrapped, self.order, self.where)
        return {}


def read_peft(tensors: Tensors, source: Source) -> Adapter:
    """Make an adapter of tensors under PEFT's names, those of a file or of a live PeftModel's state dict.

    Args:
        tensors: by PEFT's names.
        source: what else is known of them.

    Raises:
        LoRAError: tensors and options are damaged or do not go together, or this package cannot apply them.
    """
    where, description = str(source.where), source.description
    names = read_names(tensors, source.where, source.nesting)
    ours = {ours: tensors[theirs] for theirs, ours in names.ours.items()}
    adapter = _foreign(ours, names, source) if description is None else from_metadata(ours, description, where)
    words = adapter.config
    adapter = replace(adapter, config=config_in_peft(adapter))
    if source.options is not None:
        adapter = _with_options(adapter, source.options, source)
    adapter = from_peft_form(_with_our_stacks(adapter, source.where))
    check_factors(adapter, where)
    described = adapter.layers
    if source.options is not None:
        adapter = _with_scalings(adapter, source.options_path)
    refuse_file_beside_conv1d(adapter, source.where)
    if description is None:
        adapter = with_enable_lora(adapter)
        return adapter if source.options is None else _without_idle_attention(with_kinds_of_stacks(adapter, where))
    edited = adapter.layers != described
    return _as_described(_without_additions(adapter, description, where), words, edited=edited)


def _foreign(tensors: Tensors, names: PeftNames, source: Source) -> Adapter:
    """Return what names and shapes tell of an adapter that another program wrote."""
    refuse_nested(tensors, source.where)
    options = source.options or {}
    adapter = Adapter(
        tensors,
        network=names.network,
        fan_in_fan_out=options.get("fan_in_fan_out") is True,
        peft_version=str(options.get("peft_version") or ""),
    )
    adapter = adapter.with_kinds(kinds_of(adapter, names.kinds, source.where))
    if source.options is None and adapter.rows():
        raise LoRAError(
            f"{source.where}: holds trained rows of {next(iter(adapter.rows()))!r}, and not which rows these are: that "
            "is in adapter_config.json alone. Write a folder with PeftModel.save_pretrained(path), and give that."
        )
    names_of_base = _base_in_state(adapter, names) if source.options is None else _base_in_folder(adapter, options)
    base = {name: value for name, value in tensors.items() if name in names_of_base}
    entries = fingerprint_entries(base.items())
    return replace(adapter, tensors=without(tensors, base), base=base, fingerprint=entries)


def _with_options(adapter: Adapter, options: Mapping[str, Any], source: Source) -> Adapter:
    """Return the adapter with the rows, the variant, the words and the origin of adapter_config.json.

    Raises:
        LoRAError: options and tensors do not go together, or a pattern repeats a group, which may take for ever.
    """
    adapter, variant = rows_from_peft(adapter, options, source.where), cast(Variant, source.variant)
    layers, whole = adapter.module_layers, adapter.whole_tensors()
    words = options_from_peft(options, layers, whole, adapter.tables, variant.name)
    for key in (*(words.rank_pattern or ()), *(words.alpha_pattern or ())):
        if REPEATED_GROUP.search(key):
            raise LoRAError(
                f"{source.options_path}: the pattern {shown(key, 80)} repeats a group, which may take for ever. Name "
                "the layers instead."
            )
    return replace(adapter, config=words, origin=origin_of(options))


def _with_scalings(adapter: Adapter, path: object) -> Adapter:
    """Return the adapter with the scalings of adapter_config.json. No other patterns of a file are matched.

    Raises:
        LoRAError: the options say another rank than the tensors have, so that nobody knows the scaling.
    """
    words = cast(LoRAConfig, adapter.config)
    in_options = {name: adapter.options_name(name) for name in adapter.layers}
    ranks = _by_name(words.rank_pattern, in_options.values(), words.r)
    alphas = _by_name(words.alpha_pattern, in_options.values(), words.lora_alpha)
    layers = {}
    for name, layer in adapter.layers.items():
        rank, alpha = ranks[in_options[name]], alphas[in_options[name]]
        scaling = words.scaling_of(rank, alpha)
        if rank != layer.r:
            raise LoRAError(f"{path}: {name!r}: the options say r={rank}, but its factors have rank {layer.r}.")
        is_known = layer.scaling is not None and math.isclose(scaling, layer.scaling)  # unrounded, in the description
        layers[name] = layer if is_known else replace(layer, scaling=scaling)
    return replace(adapter, layers=layers)


def _by_name(patterns: Mapping[str, float] | None, names: Iterable[str], default: float) -> dict[str, Any]:
    """Return the value that patterns give each name.

    Patterns for one name each, as this package writes them, are looked up: comparing each name with each pattern takes
    long for thousands of layers.
    """
    exact, patterns = {exact_key(name): name for name in names}, patterns or {}
    if patterns.keys() <= exact.keys():
        return {name: patterns.get(key, default) for key, name in exact.items()}
    return {
        name: next((value for key, value in patterns.items() if pattern_matches(key, name)), default) for name in names
    }


def _as_described(adapter: Adapter, words: LoRAConfig | None, *, edited: bool) -> Adapter:
    """Return an adapter in PEFT's form as the model had it that wrote it, with the words of its run.

    Args:
        adapter: as PEFT reads it.
        words: of the description. Dropout may have been edited in adapter_config.json.
        edited: the scalings are others than those of the description.
    """
    stated, words = adapter.config or LoRAConfig(), words or LoRAConfig()
    scaling = {name: getattr(stated if edited else words, name) for name in options_that_decide("scaling")}
    own = replace(words, lora_dropout=stated.lora_dropout, **scaling)
    as_we_have_it = replace(with_enable_lora(adapter), config=own)
    if as_we_have_it.variant != adapter.variant:
        as_we_have_it = from_peft_form(as_we_have_it)
    return with_ranks_in_words(as_we_have_it) if edited else as_we_have_it


def _base_in_folder(adapter: Adapter, options: Mapping[str, Any]) -> set[str]:
    """Return the names of whole tensors in a folder that its options do not say were trained.

    PEFT saves embeddings beside the adapter where they are adapted, as they are, and where they were resized. The other
    end of a tied weight that was trained is not in modules_to_save either.
    """
    whole, ends = adapter.whole_tensors(), tuple(entries_in(options))
    saved = {name for name in whole if ends and any(module.endswith(ends) for module in parent_names(name))}
    base_leaves = ("weight", "bias") if options.get("bias", "none") == "none" else ("weight",)
    dumped = {name for name in whole if name.rpartition(".")[2] in base_leaves and name not in saved}
    return dumped - ties_of(saved, whole)


def _base_in_state(adapter: Adapter, names: PeftNames) -> set[str]:
    """Return the names of whole tensors that were not trained, as far as names tell it without options."""
    whole = adapter.whole_tensors()
    if not names.live:
        return {f"{layer}.weight" for layer in adapter.layers} & whole.keys()
    trained = {name for name in whole if names.saved.intersection(parent_names(name))}
    return {name for name in whole if name not in trained and name.rpartition(".")[2] not in STATISTICS}


def _with_our_stacks(adapter: Adapter, where: object) -> Adapter:
    """Return the adapter with the factors of each single parameter laid out as ours."""
    config = adapter.config or LoRAConfig()
    tensors = stacks_from_peft(adapter.tensors, factor_names(adapter), config, where)
    return replace(adapter, tensors=tensors).with_layers()


def factor_names(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of each parameter that is adapted by itself."""
    return {name: (adapter.factor_name(name, A), adapter.factor_name(name, B)) for name in adapter.parameters}


def _without_additions(adapter: Adapter, description: Mapping[str, Any], where: str) -> Adapter:
    """Return the adapter without what was written for PEFT alone: idle attention; frozen tensors go to the base.

    Raises:
        LoRAError: the description is damaged, or the factors of idle attention are not zero any more.
    """
    idle = description.get(IDLE, [])
    if not isinstance(idle, list):
        raise LoRAError(f"{where}: the adapter's description is damaged: {IDLE} is {shown(idle)}.")
    changed = [name for name in idle if name not in idle_attention(adapter)]
    if changed:
        raise LoRAError(f"{where}: the factors of {changed[0]!r} must be zero; something changed them after saving.")
    frozen = {name: value for name, value in adapter.tensors.items() if name in adapter.fingerprint}
    return replace(adapter, tensors=without(adapter.tensors, frozen), base=frozen).without_layers(idle)


def _without_idle_attention(adapter: Adapter) -> Adapter:
    """Return an adapter of PEFT's without attention that does nothing, where its out_proj alone does something."""
    return adapter.without_layers([name for name in idle_attention(adapter) if f"{name}.out_proj" in adapter.layers])
