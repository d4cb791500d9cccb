"""`lightning-lora merge`: what it does to each tensor of a base. Names and shapes are checked before writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import Adapter, strengths_text
from ..adapter.base_files import compare_with_files
from ..adapter.fingerprint import entries_match
from ..adapter.renaming import align_to_modules
from ..adapter.values import check_finite, equal_tables
from ..config import LoRAConfig
from ..errors import LoRAError
from ..exchange.pretrained_folder import refuse_adapter_beside
from ..exchange.resized_tables import refuse_other_rows
from ..files.atomic import new_file, new_folder
from ..files.inert_pickle import find_placeholder
from ..files.model_folder import weight_files
from ..files.paths import PathLike
from ..files.weights import Weights, open_weights
from ..formats.peft_equivalents import refuse_conv1d_of_model
from ..formats.peft_rows import NO_BIAS
from ..formats.sources import adapter_with_options
from ..matching import matcher
from ..names import META, PREFIX, canonical, factor_role, listed, parent_names
from ..nn.exact_merge import row_chunks
from ..nn.low_rank import (
    ATTENTION,
    CONV,
    CONV1D,
    IN_PROJ,
    LINEAR,
    MERGEABLE_DTYPES,
    PARAMETER,
    SINGLE,
    STACKS,
    row_blocks,
)
from ..nn.rounding import IN_FILES, tell_rounding
from ..nn.variant import LayerInfo, RowChunks
from ..notices import tell, warn
from ..progress import progress_bar
from .output import IN_PYTHON, check_output, refuse_quantized
from .write_merged import Job, WeightUpdate, write_file_of, write_folder_of

OF_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # how names of files of weights end
INSTEAD = "Load the model in Python and use load_adapter and save_merged instead"
OTHER_END = "tied to the other end of the model (tie_word_embeddings in config.json)"
OTHER_NAMES = "Files may have other names than the model in memory."
LEFT_OUT = (
    "The result would lack them: give the whole model with a head of this size as --base, unquantized, by "
    "save_pretrained or torch.save of its state dict, or pass --strict-base=false, which leaves them out."
)
OTHER_FILES = "Give the base that it was trained on as --base, or pass --strict-base=false, which makes this a warning."
OF_QUANTIZATION = f"{IN_PYTHON}; or pass --strict-base=false, which merges into these unquantized weights."


def merge_on_disk(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    lora_alpha: float | None = None,
    dtype: torch.dtype | None = None,
    strict_base: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Write the base's weights with the adapter merged into them; the output has the form of the base.

    Args:
        base: a folder with safetensors, a safetensors file, a Lightning checkpoint or a state dict.
        adapter: anything that holds one; it must fit the base under one prefix.
        output: appears whole, at the end.
        lora_alpha: for an adapter that does not store it.
        dtype: of the floating point tensors of the result, or None for the base's own.
        strict_base: whether another base than the adapter's, or one without a head that it trained, is an error or a
            warning.
        overwrite: replace an earlier result at `output`.

    Returns:
        Files of the base that were left out because they hold weights too.

    Raises:
        LoRAError: something does not fit. Nothing is written.
    """
    weights = open_weights(base)
    _check_form(weights, Path(output))
    check_output("merge", "folder" if weights.folder else "file", output, (base, adapter), overwrite)
    refuse_adapter_beside(output)
    with _one_thread():
        read = adapter_with_options(adapter, lora_alpha)
        _refuse_attached(read, adapter)
        in_python = _calls_in_python(read, weights, adapter, output)
        fitted = fit_to_base(read, weights, in_python, strict_base=strict_base)
        updates = plan_updates(fitted, dtype)
        folder = weights.folder
        left_out: list[Path] = []
        opening = new_folder(output, replaced=weight_files(folder.stem)) if folder else new_file(output)
        with opening as result, progress_bar("merging", weights.nbytes, "bytes") as advance:
            job = Job(weights, updates, dtype, advance)
            if folder:
                left_out = write_folder_of(job, result)
            else:
                write_file_of(job, result)
    tell_rounding(f"{output}: 16-bit weights", job.cost, IN_FILES, stacklevel=2)
    return left_out


def _refuse_attached(adapter: Adapter, path: PathLike) -> None:
    """Raise LoRAError where an adapter was trained with others attached: merged alone it is another model."""
    if adapter.attached:
        weights = " ".join(f"{each.strength:g}" for _, each in sorted(adapter.attached.items()))
        raise LoRAError(
            f"merge: {path}: was trained with {strengths_text(adapter.attached)} attached, which is not in it. "
            f"Combine them: lightning-lora combine {path} {' '.join(sorted(adapter.attached)).upper()} "
            f"--weights 1 {weights} --output COMBINED, or attach them in Python and call save_merged."
        )


@dataclass(frozen=True)
class Fitted:
    """An adapter and a base that go together.

    Attributes:
        adapter: under the names of the base's modules.
        base: with its tensors under these names.
        files: the name in the base's files, by the name here.
    """

    adapter: Adapter
    base: Weights
    files: Mapping[str, str]


def _calls_in_python(adapter: Adapter, base: Weights, path: PathLike, output: PathLike) -> str:
    """Return the sentence that says how to do the same merge in Python, where names in memory are those of the adapter.

    The base's config names the class of the model. Where more than that model was trained, such as a new head or the
    LightningModule around it, only the user knows how to build it.
    """
    names = base.folder.config.get("architectures") if base.folder else None
    part = adapter.pretrained.removesuffix(".")
    load = f"load_adapter(model, {str(path)!r})"
    save = f"save_merged(model, {str(output)!r})"
    if part:  # save_merged refuses a part of what was adapted, and layers outside of the part may be
        save = f"merge_and_unload(model); model.{part}.save_pretrained({str(output)!r})"
    if not names or part or adapter.whole_tensors():
        return f"In Python, with the model that was trained, on the weights of --base: {load}; {save}"
    return (
        f"In Python: from transformers import {names[0]}; from lightning_lora import load_adapter, save_merged; "
        f"model = {names[0]}.from_pretrained({str(base.path)!r}); {load}; {save}"
    )


def fit_to_base(adapter: Adapter, base: Weights, in_python: str = "", *, strict_base: bool = True) -> Fitted:
    """Bring an adapter under the names of a base's modules.

    Args:
        adapter: under any prefix.
        base: the weights.
        in_python: the remedy where the names do not fit.
        strict_base: as in merge_on_disk.

    Raises:
        LoRAError: the two do not go together.
    """
    _refuse_adapter(base)
    files = {canonical(name): name for name in base.tensors}
    base = replace(base, tensors={name: base.tensors[in_file] for name, in_file in files.items()})
    try:
        parameters = set(base.tensors) if adapter.parameters else set()
        advice = LEFT_OUT if strict_base else ""
        adapter = align_to_modules(adapter, base.modules() | parameters, str(base.path), of_files=advice)
    except LoRAError as error:
        raise LoRAError(f"{error} {OTHER_NAMES} {in_python}".rstrip()) from error
    refuse_quantized("merge", base, {*adapter.layers, *(name.rpartition(".")[0] for name in adapter.whole_tensors())})
    adapter = _only_placed(adapter, base, strict=strict_base)
    compare_with_files(adapter, base, strict=strict_base, remedy=OTHER_FILES, of_quantization=OF_QUANTIZATION)
    return Fitted(adapter, base, files)


def _refuse_adapter(base: Weights) -> None:
    """Raise LoRAError where the base holds an adapter, in its weights or beside them."""
    if base.holds(PREFIX):
        raise LoRAError(f"{base.path}: the base holds an adapter itself; give the weights that it was trained on.")
    if META in base.checkpoint:
        raise LoRAError(
            f"{base.path}: the base is a checkpoint of merged weights that also holds their adapter. The result would "
            "hold that adapter too, and load_from_checkpoint would load it and nothing else. To add another adapter to "
            "the merged weights, give these alone, as a state dict: torch.save(torch.load(path)['state_dict'], "
            "'base.pt')."
        )


def plan_updates(fitted: Fitted, dtype: torch.dtype | None = None) -> dict[str, WeightUpdate]:
    """Return what happens to the base's tensors, by their names in the files.

    Of one tensor several things may have been trained: it is in the adapter whole, and has a low-rank update or trained
    rows too.

    Args:
        fitted: adapter and base.
        dtype: of the result, or None for the base's own.

    Raises:
        LoRAError: merged weights cannot express the adapter.
    """
    adapter, base = fitted.adapter, fitted.base
    whole = adapter.whole_tensors()
    is_saved = matcher((adapter.config or LoRAConfig()).all_modules_to_save())
    updates = {
        name: _replacement(name, value, base, may_differ=any(map(is_saved, parent_names(name))))
        for name, value in whole.items()
        if name in base.tensors
    }
    kinds = {name: layer.kind or _kind(adapter, name, base) for name, layer in adapter.layers.items()}
    refuse_conv1d_of_model(adapter, next((name for name, kind in kinds.items() if kind == CONV1D), None), base.path)
    _refuse_contradicted(adapter, kinds, base)
    low_rank = dict(_layer_update(adapter, name, kind, base, dtype) for name, kind in kinds.items())
    rows = _row_updates(adapter, base)
    updates |= {name: replace(update, value=whole.get(name)) for name, update in (low_rank | rows).items()}
    # A low-rank update is of one end of a tie, trained rows and a weight that the adapter holds twice are of both.
    of_both_ends = (rows.keys() | set().union(*equal_tables(whole))) - low_rank.keys()
    _refuse_tied(updates, of_both_ends, base)
    return {fitted.files[name]: update for name, update in updates.items()}


def _refuse_tied(updates: Mapping[str, WeightUpdate], of_both_ends: Set[str], base: Weights) -> None:
    """Raise LoRAError where tied weights would have different values after the merge.

    Args:
        updates: by the name of the tensor.
        of_both_ends: names of updates that are right for both ends of a tie, where the base has one tensor for both.
        base: the weights.
    """
    for name, names in base.tied().items():
        if name not in updates or (len(names) == 1 and name in of_both_ends):
            continue
        if len(names) > 1 and names <= updates.keys():  # all change: alike?
            new = [updates[each].applied(base.tensors[each], base.tensors[each].dtype, [0.0, 0.0]) for each in names]
            if all(torch.equal(new[0], other) for other in new[1:]):
                continue
        also = ", ".join(map(repr, sorted(names - {name}))) or OTHER_END
        raise LoRAError(
            f"{base.path}: {name!r} is also {also}, so changing it would change that too, and merged weights cannot "
            "express the adapter. Leave the layer out of the adapter, or keep the adapter separate."
        )


def _row_updates(adapter: Adapter, base: Weights) -> dict[str, WeightUpdate]:
    """Return the update of each table that has trained rows. A tied table has one under each of its names in the base.

    Raises:
        LoRAError: a table is missing, or of another shape.
    """
    updates: dict[str, WeightUpdate] = {}
    rows = adapter.rows()
    ties = base.tied() if base.folder else {}
    for table, numbers in adapter.tables.items():
        names = [f"{table}.weight", *(f"{end}.weight" for end, first in adapter.tied.items() if first == table)]
        names = [name for name in names if name in base.tensors]
        names = sorted({other for name in names for other in ties.get(name, {name})})
        if not names and table not in adapter.tied:
            raise LoRAError(f"{base.path}: {table!r}, of which rows were trained, has no weight there. {INSTEAD}.")
        for name in names:
            shape = tuple(base.tensors[name].shape)
            dtype = base.tensors[name].dtype
            if dtype not in MERGEABLE_DTYPES or len(shape) != 2 or numbers[-1] >= shape[0]:
                raise LoRAError(f"{base.path}: {name!r} is {dtype} {shape}, and has no row {numbers[-1]} to replace.")
            if rows[table].shape[1] != shape[1]:
                raise LoRAError(f"{base.path}: rows of {name!r} have {shape[1]} values, {rows[table].shape[1]} here.")
            bias = f"{name.removesuffix('weight')}bias"
            if adapter.peft_version is not None and bias in base.tensors:
                raise LoRAError(f"{base.path}: {name!r} has trained rows and a bias; {NO_BIAS}.")
            updates[name] = WeightUpdate(row_blocks(numbers, rows[table]), 1.0)
    return updates


def _only_placed(adapter: Adapter, base: Weights, *, strict: bool) -> Adapter:
    """Return the adapter without the whole tensors in its source that the base has not, such as a trained head.

    A table may be there under the name of the other end of a tie.

    Args:
        adapter: under the names of the base's modules.
        base: the weights.
        strict: whether such a tensor is an error or left out with a warning.

    Raises:
        LoRAError: the base lacks such a tensor, or has a table with another number of rows.
    """
    here = adapter.base.keys() & base.tensors.keys()
    for name in sorted(here):
        try:
            refuse_other_rows(name, adapter.fingerprint[name].shape, base.tensors[name].shape)
        except LoRAError as error:
            raise LoRAError(f"{base.path}: {error} Then call load_adapter and save_merged.") from error
    tables = [adapter.fingerprint[name] for name in sorted(here) if len(base.tensors[name].shape) > 1]
    absent = [
        name
        for name in sorted(adapter.base.keys() - here)
        if not any(entries_match(adapter.fingerprint[name], table) for table in tables)
    ]
    whole = adapter.whole_tensors()
    absent += sorted(whole.keys() - base.tensors.keys() - set().union(*equal_tables(whole)))
    if not absent:
        return adapter
    what = f"the adapter comes with {absent[0]!r} whole, and the base has no such tensor"
    if strict:
        raise LoRAError(f"{base.path}: {what}. {LEFT_OUT} {INSTEAD}.")
    warn(f"lightning_lora: merge: {what}: {listed(absent)} {'is' if len(absent) == 1 else 'are'} left out.")
    return adapter.with_names(lambda name: None if name in absent else name)


def _check_form(base: Weights, output: Path) -> None:
    if not base.folder and output.suffix != base.path.suffix:
        raise LoRAError(
            f"merge: the output has the form of the base, so {output.name!r} must end in {base.path.suffix!r}."
        )
    if base.folder and output.suffix in OF_FILES:
        raise LoRAError(
            f"merge: the output has the form of the base, a folder, and {output.name!r} is the name of a file; give a "
            f"folder's name, as {output.stem!r}, or a file as --base."
        )
    found = find_placeholder(base.checkpoint)
    if found is not None:
        raise LoRAError(
            f"merge: {base.path}: checkpoint{found[0]} is of {found[1]}, and objects are not unpickled, so that the "
            "file cannot be written anew. Give the state dict by itself as --base."
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: the disk is the limit, and several would wait for each other at every small block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _layer_update(
    adapter: Adapter, name: str, kind: str, base: Weights, result_dtype: torch.dtype | None
) -> tuple[str, WeightUpdate]:
    """Return the name of a layer's weight, and what happens to it."""
    weight = _weight_name(adapter, name, base)
    old = base.tensors[weight]
    whole = adapter.tensors.get(weight)
    if old.dtype not in MERGEABLE_DTYPES:
        raise LoRAError(f"{base.path}: {weight!r} is {old.dtype}; only floating point weights are merged.")
    info = _placed(adapter, name, kind, old.shape)
    stored = adapter.stored(name)
    if not _fits(adapter, info):
        found = [f"{factor_role(leaf)} {tuple(stored[leaf].shape)}" for leaf in adapter.variant.trained]
        raise LoRAError(
            f"{base.path}: {name!r}: {' and '.join(found)} do not fit a {kind} layer whose weight has the "
            f"shape {tuple(old.shape)}; the adapter belongs to another base."
        )

    def read() -> RowChunks:
        if whole is None:
            return row_chunks(old)
        # W is the adapter's own, as it is written.
        return row_chunks(whole.detach().to(torch.promote_types(old.dtype, result_dtype or old.dtype)))

    blocks = adapter.variant.blocks(stored, info, read)
    return weight, WeightUpdate(blocks, adapter.scaling(name), stacked=kind in STACKS)


def _weight_name(adapter: Adapter, name: str, base: Weights) -> str:
    weight = next((each for each in adapter.weight_names(name) if each in base.tensors), None)
    if weight is None:
        raise LoRAError(f"{base.path}: {name!r}, which the adapter updates, has no weight there. {INSTEAD}.")
    return weight


def _placed(adapter: Adapter, name: str, kind: str, shape: Sequence[int]) -> LayerInfo:
    """Return a layer or parameter with its weight in the base."""
    rank = adapter.variant.rank(adapter.stored(name))
    return replace(adapter.layer_info(name), kind=kind, shape=torch.Size(shape), rank=rank)


def _fits(adapter: Adapter, info: LayerInfo) -> bool:
    """Return whether what is stored of a layer has the shapes that it has for such weights."""
    stored = adapter.stored(info.name)
    try:
        shapes = adapter.variant.shapes(info)
    except ValueError:  # the weight has other dimensions than the kind has
        return False
    return all(tuple(stored[leaf].shape) == tuple(shape) for leaf, shape in shapes.items())


def _kind(adapter: Adapter, name: str, base: Weights) -> str:
    """Return what a layer is by names and shapes, for an adapter that does not say it.

    The shape of a square weight does not tell whether it is stored (out, in) or (in, out); PEFT's fan_in_fan_out does.
    """
    weight = _weight_name(adapter, name, base)
    shape = base.tensors[weight].shape
    if adapter.is_parameter(name):
        fitting = [kind for kind in SINGLE if _fits(adapter, _placed(adapter, name, kind, shape))]
        if len(fitting) > 1:
            raise LoRAError(
                f"{base.path}: {name!r} is a stack of square matrices, so that its shape does not tell whether they "
                f"are stored (out, in) or (in, out). {INSTEAD}."
            )
        return fitting[0] if fitting else PARAMETER
    if weight.endswith(IN_PROJ):
        return ATTENTION
    if len(shape) > 2:
        return CONV
    kinds = (CONV1D, LINEAR) if adapter.fan_in_fan_out else (LINEAR, CONV1D)
    return next((kind for kind in kinds if _fits(adapter, _placed(adapter, name, kind, shape))), LINEAR)


def _refuse_contradicted(adapter: Adapter, kinds: Mapping[str, str], base: Weights) -> None:
    """Raise LoRAError for a square weight where the shape of another layer contradicts the adapter's fan_in_fan_out."""
    opposite = LINEAR if adapter.fan_in_fan_out else CONV1D
    guessed = {
        name: base.tensors[_weight_name(adapter, name, base)].shape
        for name, layer in adapter.layers.items()
        if not layer.kind
    }
    other = next((name for name in guessed if kinds[name] == opposite), None)
    square = next((name for name, shape in guessed.items() if len(shape) == 2 and shape[0] == shape[1]), None)
    if other and square:
        raise LoRAError(
            f"{base.path}: {square!r} is square, so that its shape does not tell whether it is stored (out, in) or "
            f"(in, out), and the adapter's fan_in_fan_out={adapter.fan_in_fan_out} is contradicted by {other!r}. "
            f"{INSTEAD}."
        )


def _replacement(name: str, value: Any, base: Weights, *, may_differ: bool) -> WeightUpdate:
    """Return the update of a tensor that the adapter holds whole and that takes the place of the base's.

    One that modules_to_save names, such as a new head, may have another shape, but not in a folder: its config.json
    says the shapes.
    """
    old = base.tensors[name]
    found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    free = may_differ and not base.folder and isinstance(value, torch.Tensor)
    if found != tuple(old.shape) and not free:
        raise LoRAError(
            f"{base.path}: {name!r} has shape {tuple(old.shape)}, in the adapter {found}. {INSTEAD}, or "
            "give a base of that shape, such as one with a head for as many classes."
        )
    if value.shape != old.shape:
        tell(f"lightning_lora: merge: {name!r} is the adapter's, {tuple(value.shape)}; in the base {tuple(old.shape)}")
    if value.is_floating_point() != old.dtype.is_floating_point:
        raise LoRAError(f"{base.path}: {name!r} is {old.dtype}, in the adapter {value.dtype}.")
    if value.is_floating_point():
        is_mask = value.isinf() & (value == old.to(value.dtype)) if value.shape == old.shape else torch.tensor(False)
        check_finite(name, value.masked_fill(is_mask, 0))  # it is infinite in the base too
    return WeightUpdate(value=value)
