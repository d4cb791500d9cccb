"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

Options and tensors go under PEFT's names. The header of the tensor file also carries this package's own description,
which other readers pass over; buffers such as BatchNorm's statistics go in by their plain names, as PEFT loads them.

Buffers of a LightningModule outside the network that was adapted, as a loss function's weights, belong to no file of
PEFT's. They lie beside it in outside_network.safetensors, which the description names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ..adapter.adapter import Adapter, check_factors, exact_options, ties_of
from ..adapter.file_options import check_options, readable_options
from ..adapter.metadata import from_metadata, to_metadata
from ..config import LoRAConfig
from ..errors import LoRAError, sentence, shown
from ..files.atomic import new_folder
from ..files.paths import PathLike, kind_of, parse_json, read_json, write_json
from ..files.safetensors import read_safetensors, write_tensors
from ..files.torch_archive import read_torch_file
from ..names import A, B, parent_names
from ..nn.low_rank import ATTENTION, ATTENTION_OUTPUT, SEPARATE
from ..nn.variant import Variant
from .peft_attention import refuse_conv1d_before_parameters
from .peft_edited import honour_options
from .peft_forms import config_in_peft, from_peft_form, spread, to_peft_form
from .peft_mapping import (
    add_idle_attention,
    as_plain,
    from_peft_options,
    from_plain,
    idle_attention,
    options_from_peft,
    options_to_peft,
    origin_of,
    refuse_options,
)
from .peft_names import PREFIX, peft_name, read_names
from .peft_parameters import (
    PARAMETERS,
    Order,
    nesting_in_peft,
    nesting_of,
    nesting_of_metadata,
    stacks_from_peft,
    stacks_to_peft,
    usual_order,
)
from .peft_rows import as_peft_stores, peft_table_name, rows_from_peft
from .peft_saved_modules import entries_in, frozen_in_saved
from .peft_state_dict import kinds_of, read_state

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
OUTSIDE_FILE = "outside_network.safetensors"
TENSOR_FILES = (TENSOR_FILE, OUTSIDE_FILE)
OLD_TENSOR_FILE = "adapter_model.bin"
HEADER_KEY = "lightning_lora"
FROZEN = "frozen"  # in the description: the tensors that were not trained, and are there because PEFT wants them
IDLE = "idle"  # in the description: the layers that add_idle_attention added


def write_folder(adapter: Adapter, path: PathLike, frozen: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write an adapter as a PEFT folder under the network's names; what else is in the folder stays.

    Args:
        adapter: what is written.
        path: the folder.
        frozen: the tensors of frozen_in_saved, by the network's names.

    Raises:
        LoRAError: PEFT has no equal of one of its layers, or wants frozen tensors that were not given. Nothing is
            written.
    """
    extra = [name for name, value in adapter.tensors.items() if not isinstance(value, torch.Tensor)]
    if extra:
        warnings.warn(f"lightning_lora: the extra state {extra} is no tensor and is left out.", stacklevel=3)
        kept = {n: t for n, t in adapter.tensors.items() if n not in extra}
        adapter = replace(adapter, tensors=kept, complete=False)
    outside = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(adapter.network)}
    own = adapter.by_network_names()
    _refuse_missing_frozen(own, frozen or {})
    for name in own.layers():
        _refuse_without_equal(own, name)
    refuse_conv1d_before_parameters(own)
    own = as_peft_stores(own)
    own, idle = add_idle_attention(own)
    own = replace(own, config=readable_options(own))
    plain = as_plain(to_peft_form(own))
    layers = set(own.layers())
    nesting = nesting_of(own.parameters)
    values = stacks_to_peft({**plain.tensors, **(frozen or {})}, _factor_names(own).values())
    tables = {*own.tables, *own.tied}
    tensors = {}
    for name, tensor in values.items():
        in_table = peft_table_name(name, tables)
        of_layer = peft_name(name, plain.variant, layers, own.kinds, nesting)
        tensors[f"{PREFIX}{in_table}" if in_table != name else of_layer] = tensor
    description = to_metadata(own)
    if frozen:
        description[FROZEN] = sorted(frozen)
    if idle:
        description[IDLE] = idle
    if nesting:
        description[PARAMETERS] = nesting
    if outside:
        description |= {"outside": {"network": adapter.network, "tensors": sorted(outside)}}
    text = json.dumps(description, separators=(",", ":"))
    with new_folder(path, keep_others=True, replaced=[OUTSIDE_FILE]) as folder:
        write_tensors(folder / TENSOR_FILE, _copies(tensors), {"format": "pt", HEADER_KEY: text})
        if outside:
            write_tensors(folder / OUTSIDE_FILE, _copies(outside), {"format": "pt"})
        write_json(folder / CONFIG_FILE, options_to_peft(plain))


def _factor_names(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of each parameter that is adapted by itself."""
    return {name: (adapter.factor_name(name, A), adapter.factor_name(name, B)) for name in adapter.parameters}


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return own copies on the CPU, whose elements follow each other."""
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def _refuse_missing_frozen(adapter: Adapter, frozen: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in frozen_in_saved(adapter) if name not in frozen]
    if missing:
        raise LoRAError(
            f"save_adapter: PEFT's modules_to_save takes every module whose name ends in an entry, and so wants "
            f"{missing[0]!r} in the file, which the adapter does not hold. Load the adapter onto its model and call "
            "save_adapter."
        )


def _refuse_without_equal(adapter: Adapter, name: str) -> None:
    kind = adapter.kinds.get(name, "")
    problem = adapter.variant.peft_problem(kind) or _place_problem(adapter, name, kind)
    if problem:
        raise LoRAError(f"save_adapter: {name!r} {problem}; save a Lightning checkpoint instead.")


def _place_problem(adapter: Adapter, name: str, kind: str) -> str:
    """Say what PEFT has no equal of in where a layer or parameter is, or return ""."""
    module = name.rpartition(".")[0]
    if kind == ATTENTION_OUTPUT and adapter.kinds.get(module) != ATTENTION:
        return _output_problem(adapter, module)
    if kind == ATTENTION:
        return _attention_problem(adapter, name)
    if adapter.is_parameter(name) and not module:
        return "belongs to the model itself, to which PEFT gives no adapter; put it into a module"
    return ""


def _output_problem(adapter: Adapter, attention: str) -> str:
    if not attention:
        return "belongs to attention without a name, to which PEFT gives no adapter; put it into a module"
    if any(f"{attention}.{leaf}" in adapter.fingerprint for leaf in SEPARATE):
        return f"belongs to {attention!r}, which has q, k and v apart, and PEFT cannot adapt that"
    return ""


def _attention_problem(adapter: Adapter, name: str) -> str:
    a, b = adapter.factor(name, A), adapter.factor(name, B)
    output = f"{name}.out_proj"
    if f"{output}.{A}" not in adapter.tensors:
        return "is adapted without its out_proj; PEFT adapts attention whole"
    if b.shape[0] != 3 * a.shape[1] or a.shape[0] != b.shape[1]:
        return "has separate or partly adapted q, k and v, which PEFT has not"
    ranks = adapter.tensors[f"{output}.{A}"].shape[0], adapter.tensors[f"{output}.{B}"].shape[1]
    if ranks != (b.shape[1], b.shape[1]) or adapter.scalings[output] != adapter.scalings[name]:
        return "has another rank or lora_alpha than its out_proj; PEFT has one for both"
    return ""


def read_folder(path: PathLike, order: Order = usual_order) -> Adapter:
    """Read a PEFT folder, whoever wrote it.

    Args:
        path: the folder.
        order: in which modules register parameters, which only the model that it is for tells.

    Raises:
        LoRAError: a file is missing or damaged, or it holds what this package cannot apply.
    """
    folder = Path(path)
    variant, options = from_peft_options(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    refuse_options(options, variant, folder / CONFIG_FILE)
    peft_tensors, header = _read_tensors(folder)
    if HEADER_KEY in header:
        adapter, outside = _read_described(peft_tensors, header[HEADER_KEY], folder / TENSOR_FILE, options)
        return _add_outside(adapter, outside, folder) if outside else adapter
    names = read_names(peft_tensors, folder, lambda wrapped: nesting_in_peft(options, wrapped, order, folder))
    tensors = {name: peft_tensors[peft_name] for peft_name, name in names.ours.items()}
    tensors = spread(names.shared, peft_tensors, tensors)
    adapter = _read_foreign(tensors, names.bare, variant, options, folder)
    several = [leaves for leaves in nesting_of(adapter.parameters).values() if len(leaves) > 1]
    return replace(adapter, assumed_order=several) if order is usual_order and several else adapter


def read_tensor_file(path: PathLike) -> Adapter:
    """Read a safetensors file with an adapter, by itself. Only this package's own stores the options with the tensors.

    Raises:
        LoRAError: it is damaged, or it holds what this package cannot apply.
    """
    peft_tensors, header = read_safetensors(path)
    if HEADER_KEY in header:
        adapter, outside = _read_described(peft_tensors, header[HEADER_KEY], Path(path))
        if outside:
            warnings.warn(
                f"lightning_lora: {path}: tensors outside the network lie in {OUTSIDE_FILE} beside it, and are read "
                "only where the folder is given.",
                stacklevel=3,
            )
        return adapter
    return read_state(peft_tensors, path)


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    if kind_of(folder / TENSOR_FILE) != "nothing" or kind_of(folder / OLD_TENSOR_FILE) == "nothing":
        return read_safetensors(folder / TENSOR_FILE)
    content = read_torch_file(folder / OLD_TENSOR_FILE)
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items()):
        raise LoRAError(f"{folder / OLD_TENSOR_FILE}: expected names and tensors.")
    return content, {}


def _read_described(
    peft_tensors: Mapping[str, torch.Tensor], text: str, where: Path, options: Mapping[str, Any] | None = None
) -> tuple[Adapter, Any]:
    """Return an adapter that this package wrote, by its header's description, and what that says of OUTSIDE_FILE.

    Args:
        peft_tensors: the tensors.
        text: the description.
        where: the file that both are in.
        options: of adapter_config.json, where that is beside it.

    Raises:
        LoRAError: the description is damaged, or the tensors are not those that it is of.
    """
    try:
        description = parse_json(text.encode("utf-8", "surrogatepass"), where)
    except LoRAError:
        raise
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{where}: its header's description is not JSON: {sentence(error)}") from error
    if not isinstance(description, dict):
        raise LoRAError(f"{where}: the adapter's description is damaged: it is {shown(description, 80)}.")
    nesting = nesting_of_metadata(description, where)
    names = read_names(peft_tensors, where, lambda wrapped: nesting)
    tensors = {name: peft_tensors[peft_name] for peft_name, name in names.ours.items()}
    adapter = from_metadata(spread(names.shared, peft_tensors, tensors), description, str(where))
    adapter = _with_our_stacks(adapter, where)
    plain = adapter
    idle = description.get(IDLE, [])
    if not isinstance(idle, list):
        raise LoRAError(f"{where}: the adapter's description is damaged: {IDLE} is {shown(idle)}.")
    changed = [name for name in idle if name not in idle_attention(adapter)]
    if changed:
        raise LoRAError(f"{where}: the factors of {changed[0]!r} must be zero; something changed them after saving.")
    adapter = _without_frozen(adapter, description.get(FROZEN, []), where)
    adapter = from_peft_form(from_plain(adapter.without_layers(idle)))
    check_factors(adapter, str(where))
    if options is not None:
        adapter = honour_options(adapter, plain, options, where.with_name(CONFIG_FILE))
    return adapter, description.get("outside")


def _without_frozen(adapter: Adapter, frozen: Any, where: Path) -> Adapter:
    """Drop the tensors that were not trained. They are in the file because PEFT wants them; the base has them too.

    Args:
        adapter: as it was read.
        frozen: the names of these tensors, as the description lists them.
        where: for messages.

    Raises:
        LoRAError: the list is damaged. The fingerprint, which is of frozen tensors, names the same.
    """
    in_both = adapter.tensors.keys() & adapter.fingerprint.keys()
    if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen) or set(frozen) != in_both:
        raise LoRAError(f"{where}: the adapter's description is damaged: {FROZEN} is {shown(frozen, 80)}.")
    return replace(adapter, tensors={name: value for name, value in adapter.tensors.items() if name not in in_both})


def _add_outside(adapter: Adapter, outside: Any, folder: Path) -> Adapter:
    """Return the adapter under the names of the LightningModule that was saved, with its tensors outside the network.

    Raises:
        LoRAError: the file is missing, damaged or of another adapter.
    """
    path = folder / OUTSIDE_FILE
    names, network = (outside.get(key) if isinstance(outside, dict) else None for key in ("tensors", "network"))
    if not isinstance(network, str) or not network.endswith(".") or not isinstance(names, list):
        raise LoRAError(f"{folder / TENSOR_FILE}: what it says of {OUTSIDE_FILE} is damaged: {shown(outside, 80)}.")
    if kind_of(path) == "nothing":
        raise LoRAError(f"{path}: is missing, and {TENSOR_FILE} says that it holds {names[:3]}; the folder was cut.")
    tensors, _ = read_safetensors(path)
    if sorted(tensors) != names or any(name.startswith(network) for name in tensors):
        raise LoRAError(
            f"{path}: holds {sorted(tensors)[:3]}, but {TENSOR_FILE} says {names[:3]}; they do not belong together."
        )
    around = adapter.renamed("", network)
    return replace(around, tensors={**around.tensors, **tensors}, network=network)


def _read_foreign(
    tensors: Mapping[str, torch.Tensor],
    peft_names: Mapping[str, str],
    variant: Variant,
    options: Mapping[str, Any],
    folder: Path,
) -> Adapter:
    """Return an adapter that another program wrote."""
    bare = rows_from_peft(Adapter(tensors), options, folder)
    layers = bare.layers()
    parameters = bare.parameters
    kinds = kinds_of(tensors, peft_names, options.get("peft_version"), folder)
    whole = bare.beside_factors()
    check_options(options, layers, folder / CONFIG_FILE)
    targets = [name for name in layers if name not in parameters]
    config = options_from_peft(options, targets, whole, bare.tables, variant.name)
    ends = tuple(entries_in(options))
    saved = {name for name in whole if ends and any(module.endswith(ends) for module in parent_names(peft_names[name]))}
    base_leaves = ("weight", "bias") if config.bias == "none" else ("weight",)
    # PEFT saves embeddings beside the adapter, as they are where they are adapted, or because they were resized. The
    # other end of a tied weight that was trained is not in modules_to_save either.
    dumped = {name for name in whole if name.rpartition(".")[2] in base_leaves and name not in saved}
    adapter = replace(
        bare,
        config=config,
        scalings={name: config.scaling(bare.options_name(name)) for name in layers},
        kinds=kinds,
        perhaps_base=frozenset(dumped - ties_of(saved, whole)),
        origin=origin_of(options),
        fan_in_fan_out=options.get("fan_in_fan_out") is True,
        peft_outputs=True,
    )
    adapter = from_peft_form(_with_our_stacks(adapter, folder))
    check_factors(adapter, str(folder))
    return _without_idle_attention(from_plain(adapter))


def _with_our_stacks(adapter: Adapter, where: object) -> Adapter:
    config = config_in_peft(adapter) or LoRAConfig()
    return replace(adapter, tensors=stacks_from_peft(adapter.tensors, _factor_names(adapter), config, where))


def _without_idle_attention(adapter: Adapter) -> Adapter:
    idle = [name for name in idle_attention(adapter) if f"{name}.out_proj" in adapter.kinds]
    if not idle or adapter.config is None:
        return adapter
    adapter = adapter.without_layers(idle)
    return replace(
        adapter,
        config=exact_options(cast(LoRAConfig, adapter.config), adapter.ranks(), adapter.scalings, adapter.parameters),
    )
