"""Select what the options name in a model: layers, single parameters, tables, and modules that are fully trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..config import TASK_HEADS, LoRAConfig
from ..matching import BY_KIND, PATTERNS, Unmatched, layer_number, matcher, naming_some, near_misses
from ..names import parent_names
from ..nn.adapted_module import NamedModules
from ..nn.layer_kinds import ADAPTABLE, layer_class
from ..nn.low_rank import SEPARATE
from ..nn.parameter import weights_of
from .injection import Chosen, Injection
from .layers_by_kind import layers_by_kind
from .reasons import LAYER, PARAMETER, TABLE, Candidate
from .token_tables import Rows, token_tables, with_tied_tables

TRAINED_WHOLE = "is in target_modules and in modules_to_save, and so is fully trained, without an adapter"

Modules = Mapping[str, nn.Module]
Place = tuple[nn.Module, str]  # of a single parameter: its module, and its name in the module


@dataclass(frozen=True)
class Selection:
    """The modules that the options of a config name in a model, by name.

    Attributes:
        layers: the modules to adapt.
        apart: attention whose weights of q, k and v are adapted as three single parameters.
        outputs: the attention of each out_proj that is adapted with it, and so has its r and lora_alpha, as in PEFT.
        parameters: each single parameter to adapt.
        tables: the rows to train of each table that trainable_token_indices names, or that is tied to such a table.
        saved: the modules that modules_to_save and task_type name.
        left_out: why a value of BY_KIND, such as "all-linear", leaves a layer out.
        saved_instead: modules that both target_modules and modules_to_save name. They are fully trained.
        unmatched: the entries that name nothing.
    """

    layers: dict[str, nn.Module]
    apart: Mapping[str, nn.Module]
    outputs: Mapping[str, str]
    parameters: dict[str, Place]
    tables: dict[str, Rows]
    saved: dict[str, nn.Module]
    left_out: dict[str, str]
    saved_instead: list[str]
    unmatched: Unmatched

    def is_empty(self) -> bool:
        """Return whether the options name nothing that is trained."""
        return not (self.layers or self.parameters or self.tables or self.saved)

    def names(self) -> set[str]:
        """Return the names of all layers and single parameters to adapt."""
        return {*self.layers, *self.parameters}

    def trains_without_layers(self, model: nn.Module, bias: str) -> bool:
        """Return whether rows of a table, a saved module or a bias of the model are trained, by the option `bias`."""
        saved = (parameter for module in self.saved.values() for parameter in module.parameters())
        biases = (p for name, p in model.named_parameters() if bias == "all" and name.rpartition(".")[2] == "bias")
        return bool(self.tables) or any(parameter.is_floating_point() for parameter in (*saved, *biases))

    def is_saved(self, name: str) -> bool:
        """Return whether a module is fully trained, by itself or inside another."""
        return not self.saved.keys().isdisjoint((name, *parent_names(name)))

    def refuse(self, modules: Modules, config: LoRAConfig, new: Collection[str]) -> None:
        """Raise LoRAError for the first layer, parameter or table that cannot be adapted.

        Args:
            modules: of the model.
            config: the options.
            new: the names of those that are not adapted yet.
        """
        for name, module in {**self.layers, **self.apart}.items():
            if name in new:
                Candidate(LAYER, name, module, config).refuse()
        layers = set(self.layers.values())
        for name, (module, leaf) in self.parameters.items():
            if name in new:
                also = LAYER if module in layers else ""
                Candidate(PARAMETER, name, module, config, leaf, also=also).refuse()
        for name, rows in self.tables.items():
            if name in new:
                also = LAYER if name in self.layers else PARAMETER if f"{name}.weight" in self.parameters else ""
                also = "modules_to_save" if self.is_saved(name) else also
                Candidate(TABLE, name, modules[name], config, rows=rows, also=also).refuse()


def selected(listed_modules: NamedModules, injection: Injection) -> Selection:
    """Select what an injection adapts and trains in a model: what a loaded adapter has, or what the options name."""
    if injection.chosen is not None:
        return select_chosen(listed_modules, injection.chosen)
    return select(listed_modules, injection.config)


def select_chosen(listed_modules: NamedModules, chosen: Chosen) -> Selection:
    """Select exactly what a loaded adapter has in a model. Names that the model lacks are refused at loading."""
    modules = {name: module for name, module in listed_modules if name}
    weights = weights_of(dict(listed_modules)) if chosen.layers.keys() - modules.keys() else {}
    return Selection(
        layers={name: module for name, module in modules.items() if name in chosen.layers},
        apart={},
        outputs={},
        parameters={name: place for name, place in weights.items() if name in chosen.layers},
        tables=with_tied_tables({n: rows for n, rows in chosen.tables.items() if n in modules}, modules),
        saved={},
        left_out={},
        saved_instead=[],
        unmatched=Unmatched(),
    )


def select(listed_modules: NamedModules, config: LoRAConfig) -> Selection:
    """Select what the options of a config name in a model.

    Args:
        listed_modules: every module of the model under its first name, the model first.
        config: the options.

    Raises:
        LoRAError: trainable_token_indices gives two lists of rows to one table.
    """
    model, modules = listed_modules[0][1], {name: module for name, module in listed_modules if name}
    is_saved, excluded, unmatched = matcher(config.all_modules_to_save()), matcher(config.exclude_modules), Unmatched()
    saved = {name: module for name, module in modules.items() if is_saved(name)}
    tables = token_tables(listed_modules, config.trainable_token_indices, unmatched)
    by_kind, left_out = config.target_modules in BY_KIND, dict[str, str]()
    if by_kind:
        chosen, left_out = layers_by_kind(listed_modules, config, tables)
    else:
        chosen = {name: modules[name] for name in filter(config.target(), modules)}
    layers = {
        name: module
        for name, module in chosen.items()
        if not excluded(name) and (not saved or saved.keys().isdisjoint((name, *parent_names(name))))
    }
    outputs = _add_outputs(layers, modules, excluded, named=() if by_kind else frozenset(layers))
    apart = {n: m for n, m in layers.items() if isinstance(m, nn.MultiheadAttention) and not m._qkv_same_embed_dim}
    weights = weights_of({"": model, **modules}) if config.target_parameters else {}
    parameters = {
        name: weights[name]
        for name in filter(matcher(config.target_parameters), weights)
        if not excluded(name) and not excluded(name.rpartition(".")[0])
    }
    selection = Selection(
        layers={name: module for name, module in layers.items() if name not in apart},
        apart=apart,
        outputs=outputs,
        parameters=parameters | {f"{name}.{leaf}": (m, leaf) for name, m in apart.items() for leaf in SEPARATE},
        tables=tables,
        saved=saved,
        left_out=left_out,
        saved_instead=[] if by_kind else [name for name in chosen if name in saved],
        unmatched=unmatched,
    )
    _check_entries(selection, config, modules, weights, chosen)
    _check_that_something_is_adapted(selection, config, model, modules, chosen)
    return selection


def _add_outputs(
    layers: dict[str, nn.Module], modules: Modules, excluded: Callable[[str], bool], named: Collection[str]
) -> dict[str, str]:
    """Add out_proj of each attention to the layers, because PEFT adapts attention whole. In place.

    Args:
        layers: the layers to adapt.
        modules: of the model.
        excluded: whether exclude_modules names a module.
        named: the layers that target_modules itself names.

    Returns:
        The attention of each out_proj that has its options.
    """
    outputs: dict[str, str] = {}
    for name, module in list(layers.items()):
        output = f"{name}.out_proj"
        if isinstance(module, nn.MultiheadAttention) and not excluded(output):
            layers[output] = modules[output]
            if module._qkv_same_embed_dim and output not in named:
                outputs[output] = name
    return outputs


def _check_entries(
    selection: Selection, config: LoRAConfig, modules: Modules, weights: Collection[str], chosen: Collection[str]
) -> None:
    """Note each entry of an option that names nothing. In place.

    Args:
        selection: what the options name.
        config: the options.
        modules: of the model, but for itself.
        weights: the names of parameters that target_parameters can name.
        chosen: what target_modules names, be it excluded or fully trained.
    """
    note = selection.unmatched.note
    noun = "layer to adapt"
    targets = None if config.target_modules in BY_KIND else config.target_modules
    adaptable = [n for n, m in modules.items() if layer_class(m)] if targets or config.exclude_modules else []
    note("target_modules", targets, modules, noun, [*adaptable, *(BY_KIND if isinstance(targets, str) else ())])
    note("target_parameters", config.target_parameters, weights, "parameter of two or three dimensions")
    named = list(filter(matcher(config.target_parameters), weights))
    excludable = [*adaptable, *chosen, *named, *(name.rpartition(".")[0] for name in named)]
    note("exclude_modules", config.exclude_modules, excludable, noun, adaptable)
    by_task = TASK_HEADS.get(config.task_type or "", ())  # PEFT writes them into its own modules_to_save
    absent = {*by_task}.difference(naming_some(by_task, modules)) if by_task else ()
    note("modules_to_save", [n for n in config.modules_to_save or () if n not in absent], modules, "module")
    note("enable_lora", config.enable_lora, selection.layers, noun)
    if numbers := cast(tuple[int, ...], config.layers_to_transform):
        ends = [name for name in filter(matcher(targets), modules) if name not in config.target_modules]
        found = sorted(n for n in {layer_number(name, config.layers_pattern) for name in ends} if n is not None)
        note(
            "layers_to_transform",
            list(map(str, numbers)),
            list(map(str, found)),
            "layer (layers_pattern says what the number follows)",
        )
    for option in PATTERNS:
        note(option, getattr(config, option), sorted(selection.names() - selection.outputs.keys()), "adapted layer")


def _check_that_something_is_adapted(
    selection: Selection, config: LoRAConfig, model: nn.Module, modules: Modules, chosen: Modules
) -> None:
    """Note where no layer is left to adapt, and why. In place.

    Args:
        selection: what the options name.
        config: the options.
        model: of which `modules` are the others.
        chosen: what target_modules names, be it excluded or fully trained.
    """
    errors = selection.unmatched.errors
    if selection.names():
        return
    if config.names_no_layer:
        if not errors and not selection.trains_without_layers(model, config.bias):
            errors.append(
                "target_modules: [] adapts no layer, and nothing else is trained; name layers to adapt, or in "
                "modules_to_save a module to train whole, such as a new head"
            )
        return
    adaptable = [name for name, module in modules.items() if layer_class(module)]
    if layer_class(model) and not adaptable:
        errors[:] = [
            f"the model is itself a layer ({type(model).__name__}), and layers are adapted by their names in a model; "
            "put it into one, as nn.Sequential(layer)"
        ]
    if errors:
        return
    others = [name for name in adaptable if not selection.is_saved(name)]
    if selection.saved_instead:
        why = f": {selection.saved_instead[0]!r} {TRAINED_WHOLE}"
    elif chosen:
        why = f"; exclude_modules or modules_to_save takes out {next(iter(chosen))!r} ({len(chosen)} in all)"
    else:
        why = "".join(f"; {name!r} is left out: {reason}" for name, reason in list(selection.left_out.items())[:1])
        why += f"; target_modules can name others{near_misses('', others)}" if others else ""
        why += "" if others else f"; there is no layer of a kind that can be adapted: {ADAPTABLE}"
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    errors.append(f"target_modules: {targets!r} leaves no layer to adapt{why}")


def warn_of_unused(selection: Selection, stacklevel: int) -> None:
    """Warn of entries of options that name nothing beside others that do."""
    if selection.unmatched.unused:
        said = "; ".join(selection.unmatched.unused)
        warnings.warn(f"lightning_lora: entries that name nothing are ignored: {said}", stacklevel=stacklevel + 1)
