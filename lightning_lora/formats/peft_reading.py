"""Reading PEFT's tensors: the same steps in the same order for a folder, a lone file and a state dict.

    read_folder, read_tensor_file    files: options, tensors, and our description in the header
    read_peft                        from these to an adapter:
        read_names                   our names for PEFT's, by peft_names.py
        from_metadata or _foreign    of our own files what their description says; else what names and shapes tell
        _decoded
            config_in_peft           the options that the adapter has in PEFT's form
            _with_options            adapter_config.json, by peft_options.py, and rows of tables, by peft_rows.py
            stacks_from_peft         the layout of experts, by peft_parameters.py
            from_peft_form           what the variant has in another form, by peft_equivalents.py
            check_factors            shapes and values go together: from here on they are computed with
        _with_scalings               a rank and a scaling for each layer
        refuse_file_beside_conv1d    attention beside a Conv1D, of which nobody knows the layout
        of our own files
            _without_additions       what was written for PEFT alone leaves
            _as_described            the options of the run
        of other programs' files
            with_enable_lora         what PEFT has another equal for, by peft_equivalents.py
            with_kinds_of_stacks     which parameters are stacks of experts
            without_layers           attention of which the output projection alone does something

sources.py tells which of the first two reads a path.

Sources differ in how much they tell beside their tensors. A Source holds that:

    description           in the header of a file that this package wrote: options, kinds, fingerprint
    options               adapter_config.json
    nothing               ranks are in the shapes; scalings have to come from an injected model

adapter_config.json is read whoever wrote it, as PEFT reads it alone: its variant, scalings, dropout and rows count, and
a rank must be that of the tensors. The description adds what PEFT does not know: kinds of layers, enable_lora, start
factors, fingerprint. What selects layers and modules in the JSON is not read, because the tensors name them.
"""

from __future__ import annotations

import json
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
from ..adapter.metadata import check_format, from_metadata, without
from ..adapter.values import refuse_nested, ties_of
from ..config import LoRAConfig, options_that_decide
from ..errors import LoRAError, shown
from ..files.paths import PathLike, kind_of, read_json, reading
from ..files.safetensors import read_safetensors
from ..files.torch_archive import read_torch_file
from ..matching import exact_key, pattern_matches
from ..names import A, B, parent_names
from ..nn.low_rank import ATTENTION_OUTPUT, CONV
from ..nn.variant import Variant
from .forms import CONFIG_FILE, form_of, refuse_named_adapters
from .peft_equivalents import (
    check_peft_version,
    config_in_peft,
    from_peft_form,
    idle_attention,
    refuse_file_beside_conv1d,
    with_enable_lora,
)
from .peft_names import PeftNames, read_names
from .peft_options import (
    entries_in,
    from_peft_options,
    options_from_peft,
    origin_of,
    refuse_options,
    with_ranks_in_options,
)
from .peft_parameters import (
    Nesting,
    Order,
    nesting_in_peft,
    nesting_of_metadata,
    stacks_from_peft,
    usual_order,
    with_kinds_of_stacks,
)
from .peft_rows import rows_from_peft

TENSOR_FILE = "adapter_model.safetensors"
OLD_TENSOR_FILE = "adapter_model.bin"
HEADER_KEY = "lightning_lora"  # of this package's description, in the header of a tensor file
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


def read_folder(path: PathLike, order: Order = usual_order) -> Adapter:
    """Read a PEFT folder, whoever wrote it.

    Args:
        path: the folder.
        order: the order in which modules register parameters. Only the model that the adapter is for tells it.

    Raises:
        LoRAError: a file is missing or damaged, or it holds what this package cannot apply.
    """
    refuse_named_adapters(path)
    folder = Path(path)
    if form_of(folder) == "folder":
        raise LoRAError(f"{folder}: holds no adapter; there is no such file as {CONFIG_FILE} in it.")
    options_path, tensor_path = folder / CONFIG_FILE, folder / TENSOR_FILE
    variant, options = from_peft_options(read_json(options_path), options_path)
    refuse_options(options, variant, options_path)
    header: Mapping[str, str] = {}
    if kind_of(tensor_path) == "nothing" and kind_of(folder / OLD_TENSOR_FILE) != "nothing":
        tensors = read_torch_file(folder / OLD_TENSOR_FILE)
        if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
            raise LoRAError(f"{folder / OLD_TENSOR_FILE}: expected names and tensors.")
    else:
        tensors, header = read_safetensors(tensor_path)
    description = description_in(header, tensor_path)
    where = folder if description is None else tensor_path
    source = Source(where, options_path, options, variant, description, order=order)
    return read_peft(tensors, source)


def read_tensor_file(path: PathLike) -> Adapter:
    """Read a safetensors file with an adapter, by itself. Only this package's own stores the options with the tensors.

    Raises:
        LoRAError: it is damaged, or it holds what this package cannot apply.
    """
    tensors, header = read_safetensors(path)
    description = description_in(header, Path(path))
    return read_peft(tensors, Source(path, description=description))


def description_in(header: Mapping[str, str], where: Path) -> dict[str, Any] | None:
    """Return what this package wrote into a file's header, or None in a file of others.

    Raises:
        LoRAError: it is not JSON, or of another form or format.
    """
    text = header.get(HEADER_KEY)
    if text is None:
        return None
    with reading(where, "an adapter's description in JSON"):
        description = json.loads(text)
    if not isinstance(description, dict):
        raise LoRAError(f"{where}: the adapter's description is damaged: it is {shown(description, 80)}.")
    check_format(description, where)
    return description


def read_peft(tensors: Tensors, source: Source) -> Adapter:
    """Make an adapter of tensors under PEFT's names, those of a file or of a live PeftModel's state dict.

    Args:
        tensors: by PEFT's names.
        source: what else is known of them.

    Raises:
        LoRAError: tensors and options are damaged or do not go together, or this package cannot apply them.
    """
    names = read_names(tensors, source.where, source.nesting)
    ours = {ours: tensors[theirs] for theirs, ours in names.ours.items()}
    if source.description is not None:
        return _read_own(ours, source.description, source)
    return _read_foreign(ours, names, source)


def _read_own(tensors: Tensors, description: Mapping[str, Any], source: Source) -> Adapter:
    """Return the adapter of a file that this package wrote. It may have been edited since, as PEFT's files may."""
    where = str(source.where)
    described = from_metadata(tensors, description, where)
    decoded = _decoded(described, source)
    adapter = decoded if source.options is None else _with_scalings(decoded, source.options_path)
    refuse_file_beside_conv1d(adapter, source.where)
    adapter_alone = _without_additions(adapter, description, where)
    return _as_described(adapter_alone, described.config, edited=adapter.layers != decoded.layers)


def _read_foreign(tensors: Tensors, names: PeftNames, source: Source) -> Adapter:
    """Return the adapter of a file that another program wrote, or of a live PeftModel."""
    adapter = _decoded(_foreign(tensors, names, source), source)
    if source.options is not None:
        adapter = _with_scalings(adapter, source.options_path)
    refuse_file_beside_conv1d(adapter, source.where)
    adapter = with_enable_lora(adapter)
    if source.options is None:
        return adapter
    adapter = with_kinds_of_stacks(adapter, str(source.where))
    # PEFT adapts attention whole. Where its out_proj alone does something, it alone is adapted here.
    return adapter.without_layers([name for name in idle_attention(adapter) if f"{name}.out_proj" in adapter.layers])


def _decoded(adapter: Adapter, source: Source) -> Adapter:
    """Return an adapter in PEFT's form with our options, layouts and factors, which go together."""
    adapter = replace(adapter, config=config_in_peft(adapter))  # a description has those of the run
    if source.options is not None:
        adapter = _with_options(adapter, source.options, source)
    where = str(source.where)
    stacks = stacks_from_peft(adapter.tensors, factor_names(adapter), adapter.config or LoRAConfig(), where)
    adapter = from_peft_form(replace(adapter, tensors=stacks).with_layers())
    check_factors(adapter, where)  # what is missing or damaged came through until here
    return adapter


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
    adapter = adapter.with_kinds(_kinds_of(adapter, names.kinds, source.where))
    if source.options is None and adapter.rows():
        raise LoRAError(
            f"{source.where}: holds trained rows of {next(iter(adapter.rows()))!r}, and not which rows these are: that "
            "is in adapter_config.json alone. Write a folder with PeftModel.save_pretrained(path), and give that."
        )
    names_of_base = _base_in_state(adapter, names) if source.options is None else _base_in_folder(adapter, options)
    base = {name: value for name, value in tensors.items() if name in names_of_base}
    entries = fingerprint_entries(base.items())
    return replace(adapter, tensors=without(tensors, base), base=base, fingerprint=entries)


def _kinds_of(adapter: Adapter, in_names: Mapping[str, str], where: object) -> dict[str, str]:
    """Return the kind of each layer whose kind PEFT's names and the factors' shapes tell.

    Args:
        adapter: by its tensors alone.
        in_names: the kinds that names tell.
        where: for messages.

    Raises:
        LoRAError: a layer is of a kind that cannot be applied.
    """
    kinds = dict(in_names)
    if ATTENTION_OUTPUT in kinds.values():
        check_peft_version(adapter.peft_version, where)
    for name in adapter.module_layers:  # of a parameter its model tells whether it is a stack, and which
        a, b = adapter.tensors.get(f"{name}.{A}"), adapter.tensors.get(f"{name}.{B}")
        if a is not None and b is not None and a.dim() == b.dim() > 2:
            if b.shape[1] != a.shape[0] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
                raise LoRAError(
                    f"{where}: {name!r} is a convolution with {a.shape[0] // b.shape[1]} groups: A {tuple(a.shape)} "
                    f"sees all input channels, B {tuple(b.shape)} one group of the rank. Their product crosses the "
                    "groups: no grouped weight equals it, and it cannot be applied."
                )
            kinds[name] = CONV
    return kinds


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


def _with_options(adapter: Adapter, options: Mapping[str, Any], source: Source) -> Adapter:
    """Return the adapter with the rows, the variant, the options and the origin of adapter_config.json.

    Raises:
        LoRAError: options and tensors do not go together, or a pattern repeats a group, which may take for ever.
    """
    adapter, variant = rows_from_peft(adapter, options, source.where), cast(Variant, source.variant)
    layers, whole = adapter.module_layers, adapter.whole_tensors()
    config = options_from_peft(options, layers, whole, adapter.tables, variant.name)
    for key in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        if REPEATED_GROUP.search(key):
            raise LoRAError(
                f"{source.options_path}: the pattern {shown(key, 80)} repeats a group, which may take for ever. Name "
                "the layers instead."
            )
    return replace(adapter, config=config, origin=origin_of(options))


def factor_names(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of each parameter that is adapted by itself."""
    return {name: (adapter.factor_name(name, A), adapter.factor_name(name, B)) for name in adapter.parameters}


def _with_scalings(adapter: Adapter, path: object) -> Adapter:
    """Return the adapter with the scalings of adapter_config.json. No other patterns of a file are matched.

    Raises:
        LoRAError: the options say another rank than the tensors have, so that nobody knows the scaling.
    """
    config = cast(LoRAConfig, adapter.config)
    in_options = {name: adapter.options_name(name) for name in adapter.layers}
    ranks = _by_name(config.rank_pattern, in_options.values(), config.r)
    alphas = _by_name(config.alpha_pattern, in_options.values(), config.lora_alpha)
    layers = {}
    for name, layer in adapter.layers.items():
        rank, alpha = ranks[in_options[name]], alphas[in_options[name]]
        scaling = config.scaling_of(rank, alpha)
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


def _as_described(adapter: Adapter, config: LoRAConfig | None, *, edited: bool) -> Adapter:
    """Return an adapter in PEFT's form as the model had it that wrote it, with the options of its run.

    Args:
        adapter: as PEFT reads it.
        config: of the description. Dropout may have been edited in adapter_config.json.
        edited: the scalings are others than those of the description.
    """
    stated = adapter.config or LoRAConfig()
    config = config or LoRAConfig()
    scaling = {name: getattr(stated if edited else config, name) for name in options_that_decide("scaling")}
    own = replace(config, lora_dropout=stated.lora_dropout, **scaling)
    as_we_have_it = replace(with_enable_lora(adapter), config=own)
    if as_we_have_it.variant != adapter.variant:
        as_we_have_it = from_peft_form(as_we_have_it)
    return with_ranks_in_options(as_we_have_it) if edited else as_we_have_it
