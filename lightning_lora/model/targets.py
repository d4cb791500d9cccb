"""Find the modules that the options name, and check that each can be adapted."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..config import TASK_HEADS, LoRAConfig
from ..distributed.sharding import is_sharded
from ..errors import LoRAError
from ..matching import (
    ALL_LAYERS,
    ALL_LINEAR,
    BY_KIND,
    layer_number,
    matcher,
    naming_some,
    near_misses,
    pattern_matches,
)
from ..names import A, canonical, listed, parent_names
from ..nn.adapted_module import AdaptedModule, Swapped
from ..nn.adapted_weights import NamedModules
from ..nn.layer_kinds import ADAPTABLE, layer_class
from ..nn.low_rank import ATTENTION_WEIGHTS, FUSABLE, MERGEABLE_DTYPES, SEPARATE, matrix_shape
from ..nn.parameter import LoRAParameterHolder, weights_of
from ..nn.quantised import quantised_as, quantised_parameters, shape_of, was_never_quantised
from ..nn.token_rows import is_table
from ..nn.variant import variant_of
from .heads import option_that_leaves_plain
from .layers_by_kind import is_empty, layers_by_kind, more_layers
from .token_tables import OPTION, TokenTables

TRAINED_WHOLE = "is in target_modules and in modules_to_save, and so is trained whole, without an adapter"
SCRIPTED = "TorchScript has compiled its forward, which would pass over the adapter; build it without torch.jit"


class Targets:
    """The modules that the options of a config name in a model, by name.

    Attributes:
        layers: the modules to adapt.
        parameters: each single parameter to adapt, as its module and its name in the module.
        tables: the rows to train of each table that trainable_token_indices names, or that is tied to such a table.
        saved: the modules that modules_to_save and task_type name.
        left_out: why a value of BY_KIND, such as "all-linear", leaves a layer out.
        saved_instead: modules that both target_modules and modules_to_save name. They are trained whole.
        errors: a sentence for each entry of an option of which no entry names anything.
        unused: for each option the entries that name nothing beside others that do: one list may serve many models.
    """

    def __init__(self, listed_modules: NamedModules, config: LoRAConfig, scope: str = "") -> None:
        """Find the modules.

        Args:
            listed_modules: every module of the model under its first name, the model first.
            config: the options.
            scope: the beginning of the names of modules that can be trained whole, "" or ending in a dot.
        """
        model, modules = listed_modules[0][1], {name: module for name, module in listed_modules if name}
        saved, targeted, excluded = map(
            matcher, (config.all_modules_to_save(), config.target_modules, config.exclude_modules)
        )
        self.saved = {name: module for name, module in modules.items() if saved(name) and name.startswith(scope)}
        tables = TokenTables(listed_modules, config.trainable_token_indices)
        self.tables = tables.rows
        by_kind, self.left_out = config.target_modules in BY_KIND, dict[str, str]()
        if by_kind:
            chosen, self.left_out = layers_by_kind(listed_modules, config, self.tables)
        else:
            chosen = {name: module for name, module in modules.items() if targeted(name)}
        self.saved_instead = [] if by_kind else [name for name in chosen if name in self.saved]
        self.layers = {
            name: module
            for name, module in chosen.items()
            if not excluded(name)
            and self.saved.keys().isdisjoint((name, *parent_names(name)))
            and config.is_in_chosen_layer(name)
        }
        for name, module in list(self.layers.items()):  # attention is adapted whole, as PEFT does
            out_proj = f"{name}.out_proj"
            if isinstance(module, nn.MultiheadAttention) and not excluded(out_proj):
                self.layers[out_proj] = modules[out_proj]
        self.apart = {  # attention whose weights of q, k and v are three single parameters
            name: self.layers.pop(name)
            for name, module in list(self.layers.items())
            if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim
        }
        self.parameters = self._single_parameters(config, {"": model, **modules})
        self.parameters |= {f"{name}.{leaf}": (each, leaf) for name, each in self.apart.items() for leaf in SEPARATE}
        self.errors = list(tables.unmatched)
        self.unused: list[str] = []
        self._check_entries(config, chosen, modules, weights_of({"": model, **modules}))
        if layer_class(model) and not self.names() and not any(map(layer_class, modules.values())):
            reason = (
                f"the model is itself a layer ({type(model).__name__}), and layers are adapted by their names in a "
                "model; put it into one, as nn.Sequential(layer)"
            )
            self.errors = [reason]

    def is_empty(self) -> bool:
        """Return whether the options name nothing that is trained."""
        return not (self.layers or self.parameters or self.tables or self.saved)

    def names(self) -> set[str]:
        """Return the names of all layers and single parameters to adapt."""
        return {*self.layers, *self.parameters}

    def _single_parameters(
        self, config: LoRAConfig, modules: Mapping[str, nn.Module]
    ) -> dict[str, tuple[nn.Module, str]]:
        """Return each parameter that target_parameters names, as its module and its name in the module."""
        targeted, excluded = matcher(config.target_parameters), matcher(config.exclude_modules)
        parameters = {}
        for name, (module, leaf) in weights_of(modules).items() if config.target_parameters else ():
            owner = name.rpartition(".")[0]
            if targeted(name) and not excluded(name) and not excluded(owner):
                parameters[name] = (module, leaf)
        return parameters

    def _check_entries(
        self,
        config: LoRAConfig,
        chosen: Collection[str],
        modules: Mapping[str, nn.Module],
        weights: Mapping[str, tuple[nn.Module, str]],
    ) -> None:
        """Note in `errors` and `unused` each entry of an option that names nothing."""
        adaptable = [name for name, module in modules.items() if layer_class(module)]
        by_task = TASK_HEADS.get(config.task_type or "", ())  # peft writes them into its own modules_to_save
        layer = "names no layer to adapt"
        for option, names, hints, problem in (
            ("target_modules", chosen, adaptable, layer),
            ("target_parameters", weights, weights, "names no parameter of two or three dimensions"),
            ("exclude_modules", [*adaptable, *chosen, *self._excludable_weights(config, weights)], adaptable, layer),
            ("modules_to_save", modules, modules, "names no module"),
            ("enable_lora", self.layers, self.layers, layer),
        ):
            value = getattr(config, option) or ()
            if not isinstance(value, str):
                named = naming_some(value, names)
                missing = [entry for entry in value if entry not in named and entry not in by_task]
                problems = {entry: problem + near_misses(entry, hints) for entry in missing}
                self._note(option, [*named, *missing], problems)
            elif value not in BY_KIND and not any(map(matcher(value), names)):
                known = [*hints, *BY_KIND] if option == "target_modules" else hints
                self.errors.append(
                    f"{option}: {value!r} {problem}; a string is a regular expression for the whole name, a list holds "
                    f"names or their endings{near_misses(value, known)}"
                )
        self._check_numbers(config, [name for name in chosen if name not in config.target_modules])
        adapted = sorted(self.names())
        for option in ("rank_pattern", "alpha_pattern"):
            value = getattr(config, option) or ()
            missing = [key for key in value if not any(pattern_matches(key, name) for name in adapted)]
            problems = {key: f"names no adapted layer{near_misses(key, adapted)}" for key in missing}
            self._note(option, value, problems)
        if not adapted and not self.errors:
            both = f": {self.saved_instead[0]!r} {TRAINED_WHOLE}" if self.saved_instead else ""
            both = both or self._what_there_is(config, chosen, modules)
            targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
            self.errors.append(f"target_modules: {targets!r} leaves no layer to adapt{both}")

    def _note(self, option: str, entries: Collection[object], missing: Mapping[Any, str]) -> None:
        """Note the entries of an option that name nothing: as errors if none names anything."""
        if missing and len(missing) < len({*entries}):
            self.unused.append(f"{option}: {', '.join(map(repr, missing))}")
        else:
            self.errors += [f"{option}: {entry!r} {problem}" for entry, problem in missing.items()]

    def _what_there_is(self, config: LoRAConfig, chosen: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        """Return why no layer is left to adapt, and what could be."""
        has_more = config.target_modules == ALL_LINEAR and more_layers(list(modules.items()), config)
        advice = f"; {ALL_LAYERS!r} adapts more layers" if has_more else ""
        if chosen:
            return (
                f"; exclude_modules or modules_to_save takes out {next(iter(chosen))!r} ({len(chosen)} in all){advice}"
            )
        said = "".join(f"; {name!r} is left out: {reason}" for name, reason in list(self.left_out.items())[:1])
        others = [
            name
            for name, module in modules.items()
            if layer_class(module) and self.saved.keys().isdisjoint((name, *parent_names(name)))
        ]
        if not others:
            return f"{said}; there is no layer of a kind that can be adapted: {ADAPTABLE}"
        return f"{said}{advice}; target_modules can name others{near_misses('', others)}"

    def _check_numbers(self, config: LoRAConfig, names: Sequence[str]) -> None:
        """Note each entry of layers_to_transform and layers_pattern that names nothing, of layers chosen by endings."""
        patterns, numbers = config.layers_pattern or (), cast(tuple[int, ...], config.layers_to_transform or ())
        missing = [pattern for pattern in patterns if all(layer_number(name, [pattern]) is None for name in names)]
        example = f", such as {names[0]!r}" if names else ""
        problem = f"comes before no number in a layer's name{example}"
        self._note("layers_pattern", patterns, dict.fromkeys(missing, problem))
        found = {layer_number(name, config.layers_pattern) for name in names} if numbers else set()
        there = sorted(number for number in found if number is not None)
        hint = f"there are {listed(list(map(str, there)), 10)}" if there else "there are none"
        if not there and not patterns:
            hint += f"; layers_pattern says which segment the number follows{example}"
        absent = [number for number in numbers if number not in there]
        self._note("layers_to_transform", numbers, dict.fromkeys(absent, f"names no layer; {hint}"))

    @staticmethod
    def _excludable_weights(config: LoRAConfig, weights: Mapping[str, object]) -> list[str]:
        """Return the names that exclude_modules may hold beside layers: targeted parameters and their modules."""
        targeted = matcher(config.target_parameters)
        named = [name for name in weights if targeted(name)]
        return [*named, *(name.rpartition(".")[0] for name in named)]


def warn_of_unused(targets: Targets, stacklevel: int) -> None:
    """Warn of entries of options that name nothing beside others that do."""
    if targets.unused:
        said = "; ".join(targets.unused)
        warnings.warn(f"lightning_lora: entries that name nothing are passed over: {said}", stacklevel=stacklevel + 1)


def check_unadapted(modules: NamedModules) -> None:
    """Refuse a model that has adapters already, because injection would freeze or hide them.

    Raises:
        LoRAError: a module has an adapter of this package, of peft or of loralib.
    """
    model = modules[0][1]
    for name, module in modules:
        library = type(module).__module__.partition(".")[0]
        if isinstance(module, AdaptedModule):
            raise LoRAError(
                f"inject: {name!r} in {type(model).__name__} was adapted already, through a module around it; pass the "
                "module that inject was called on, or unload it first."
            )
        if library == "peft" or (library == "loralib" and hasattr(module, A)):
            where = f" at {name!r}" if name else ""
            raise LoRAError(
                f"inject: {type(model).__name__} already has adapters of {library}{where}. Leave out what put them "
                "there, such as get_peft_model, or merge or unload them first."
            )


def check_shapes(modules: NamedModules) -> None:
    """Refuse a model with a lazy layer that has no shape yet, because it can neither be frozen nor saved.

    Raises:
        LoRAError: a layer has no shape.
    """
    for name, module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            raise LoRAError(
                f"inject: {name!r}: the {type(module).__name__} has no shape yet; run one batch through the model "
                "first."
            )


def check_trainable(modules: NamedModules, saved: Mapping[str, nn.Module]) -> None:
    """Refuse to train a module whole that holds a quantised weight, because that takes no gradient.

    A layer of bitsandbytes whose weight was never quantised is refused too, because it cannot run. transformers makes
    such a layer of a head that the checkpoint lacks.

    Args:
        modules: every module of the model under its first name, the model first.
        saved: the modules that are to be trained whole, by name.

    Raises:
        LoRAError: a module holds such a layer. The message has the option that leaves it out of the quantisation.
    """
    found = {
        name: (canonical(f"{name}.{inside}".rstrip(".")), layer)
        for name, module in saved.items()
        for inside, layer in module.named_modules(remove_duplicate=False)
        if quantised_parameters(layer) or was_never_quantised(layer)
    }
    for name, (layer_name, layer) in found.items():
        kind = next(map(quantised_as, quantised_parameters(layer).values()), "")
        problem = f"is quantised ({kind}) and cannot be trained"
        if not kind:
            problem = f"is not quantised, as the checkpoint lacks it, and a {type(layer).__name__} cannot run with it"
        raise LoRAError(
            f"inject: modules_to_save names {name!r}, but the weight of {layer_name!r} {problem}. Leave it out of the "
            f"quantisation: {option_that_leaves_plain(modules, list(saved), layer)}."
        )


def check_supported(name: str, module: nn.Module, config: LoRAConfig) -> None:
    """Refuse a module that cannot be adapted with these options.

    Raises:
        LoRAError: it cannot be adapted. The message says why, and what to do.
    """
    kind, adapting, enabled = type(module).__name__, layer_class(module), config.enabled_parts(name)
    if isinstance(module, torch.jit.ScriptModule):
        problem = SCRIPTED
    elif adapting is None:
        inside = [child for child, m in module.named_modules() if child and layer_class(m)]
        problem = f"a {type(module).__module__}.{kind} cannot be adapted, only {ADAPTABLE} and their subclasses can"
        problem += f"; name the layers inside it, as {inside[0]!r}" if inside else ""
        weights = [leaf for leaf in weights_of({"": module}) if not _parameter_problem(module, leaf)]
        if weights and not inside:
            whole = [f"{name}.{leaf}" for leaf in weights]
            problem += f"; leave it out of target_modules, and adapt its parameters by target_parameters={whole}"
    elif hasattr(module, A):
        problem = f"the {kind} has a lora_A of another library; take that out first"
    elif "forward" in vars(module):
        problem = f"its forward is replaced on the instance of {kind}, which would pass over the adapter; undo that"
    else:
        problem = _weight_problem(module)
        if not problem and enabled is not None:
            problem = _parts_problem(module, adapting.KIND, len(enabled))
        if not problem:
            problem = _variant_problem(module, config)
    if problem:
        raise LoRAError(f"inject: {name!r}: {_with_remedy(problem)} leave it out with exclude_modules=[{name!r}].")


def check_table(name: str, module: nn.Module, targets: Targets) -> None:
    """Refuse a table whose rows cannot be trained, or that is adapted or trained whole too.

    Raises:
        LoRAError: the rows cannot be trained. The message says why, and what to do.
    """
    kind, rows = type(module).__name__, targets.tables[name]
    problem = ""
    if not is_table(module):
        problem = f"a {kind} is no table: only nn.Embedding and nn.Linear have rows that can be trained"
    elif name in targets.layers:
        problem = "it is in target_modules too, which adapts it whole; adapt it in one of the two ways"
    elif not targets.saved.keys().isdisjoint((name, *parent_names(name))):
        problem = "it is in modules_to_save too, which trains it whole; train it in one of the two ways"
    elif f"{name}.weight" in targets.parameters:
        problem = "its weight is in target_parameters too; adapt it in one of the two ways"
    elif hasattr(module, A):
        problem = f"the {kind} has a lora_A of another library; take that out first"
    elif "forward" in vars(module):
        problem = f"its forward is replaced on the instance of {kind}, which would pass over the rows; undo that"
    elif isinstance(module, Swapped):
        problem = f"the {kind} reads the weight of an adapted layer; leave that out with exclude_modules"
    elif getattr(module, "scale_grad_by_freq", False):
        problem = "scale_grad_by_freq counts rows in the whole table, but trained rows lie apart; turn it off"
    else:
        problem = _weight_problem(module)
        size = shape_of(module.weight)[0] if not problem else 0
        if not problem and rows[-1] >= size:
            problem = f"it has {size} rows and none of number {rows[-1]}; resize it first, or correct the number"
    if problem:
        raise LoRAError(f"inject: {name!r}: {_with_remedy(problem)} leave it out of {OPTION}.")


def check_parameter(name: str, module: nn.Module, leaf: str, *, is_layer: bool) -> None:
    """Refuse a parameter that cannot be adapted by itself, such as one of an adapted layer.

    Raises:
        LoRAError: it cannot be adapted. The message says why, and what to do.
    """
    problem = _parameter_problem(module, leaf)
    if is_layer or (isinstance(module, Swapped) and not isinstance(module, LoRAParameterHolder)):
        problem = f"its {type(module).__name__} is adapted as a layer, or reads the weight of one; adapt one of the two"
    if problem:
        raise LoRAError(f"inject: {name!r}: {_with_remedy(problem)} leave it out of target_parameters.")


def _with_remedy(problem: str) -> str:
    """Return a problem up to the last remedy of its sentence, which the caller adds; "; " begins an earlier remedy."""
    return f"{problem}{', or' if '; ' in problem else ';'}"


def _weight_problem(module: nn.Module) -> str:
    """Return why the weight of a layer cannot be adapted, or ""."""
    kind = type(module).__name__
    if getattr(module, "max_norm", None) is not None:
        return "max_norm renormalises its rows in place; set it to None"
    names = ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",)
    weights = [module._parameters[name] for name in names if module._parameters.get(name) is not None]
    if is_parametrized(module) or not weights:
        return f"the weight of the {kind} is computed from others (weight_norm, parametrize); remove that first"
    for weight in weights:
        quantised = quantised_as(weight)
        if quantised and not isinstance(module, nn.Linear):
            return f"the weight of the {kind} is quantised ({quantised}), and only linear layers may have such a weight"
    problems = (_tensor_problem(weight, kind) for weight in weights if weight is not None and not quantised_as(weight))
    return next(filter(None, problems), "")


def _parameter_problem(module: nn.Module, leaf: str) -> str:
    """Return why a parameter of a module cannot be adapted by itself, or ""."""
    kind, weight = type(module).__name__, cast(nn.Parameter, module._parameters[leaf])
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if "forward" in vars(module):
        return f"the forward is replaced on the instance of {kind}, which would pass over the adapter; undo that"
    if quantised_as(weight):
        return f"it is quantised ({quantised_as(weight)}), and a quantised weight is adapted in linear layers only"
    problem = _tensor_problem(weight, kind)
    if not problem and not weight.is_contiguous():
        return "its values do not follow each other in memory; make it contiguous"
    return problem


def _tensor_problem(weight: nn.Parameter, kind: str) -> str:
    """Return why a tensor in a module of this class cannot be adapted, or ""."""
    if is_sharded(weight) or getattr(weight, "_fsdp_flattened", False):  # the mark of FSDP1
        return (
            f"the weight of the {kind} is sharded already; call inject(model, LoRAConfig(...)) in configure_model, "
            "after the layers are built and before fully_shard, parallelize_module or wrap"
        )
    if weight.dtype not in MERGEABLE_DTYPES:
        return f"its weight is {weight.dtype}, and adapters need float16, bfloat16, float32 or float64"
    if is_empty(weight):
        return f"its weight of shape {tuple(shape_of(weight))} has no values to adapt; give it some"
    return ""


def _variant_problem(module: nn.Module, config: LoRAConfig) -> str:
    """Return why the variant cannot adapt a layer, or ""."""
    variant = variant_of(config)
    adapting = layer_class(module, variant)
    if adapting is None:
        quantised = ", ".join(map(quantised_as, quantised_parameters(module).values()))
        what = type(module).__name__ + (f" whose weight is quantised ({quantised})" if quantised else "")
        return f"{variant.option} cannot adapt a {what}"
    return variant.why_not_on(module, adapting.KIND, config)


def _parts_problem(module: nn.Module, kind: str, parts: int) -> str:
    """Return why enable_lora cannot have so many parts of a layer, or ""."""
    if kind not in FUSABLE:
        return f"enable_lora needs a linear layer, not a {type(module).__name__}"
    if isinstance(module, nn.MultiheadAttention):
        outputs = 3 * module.embed_dim
    else:
        outputs = matrix_shape(kind, shape_of(module.weight))[0]
    return f"enable_lora has {parts} parts, which do not divide its {outputs} outputs" if outputs % parts else ""
