"""Find the modules that the options name, and check that each can be adapted."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import cast

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
    is_typo,
    layer_number,
    matcher,
    most_frequent_ending,
    near_endings,
    near_misses,
    pattern_matches,
)
from ..names import A, canonical, listed, parent_names, suffixes
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
        unmatched: a sentence for each entry of an option that names nothing, and whether the entry must be a mistake.
            It need not be one where other entries of the list match: one list may serve many models.
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
        self.unmatched: dict[str, bool] = dict.fromkeys(tables.unmatched, True)
        self._check_entries(config, chosen, modules, weights_of({"": model, **modules}))
        if layer_class(model) and not self.names() and not any(map(layer_class, modules.values())):
            reason = (
                f"the model is itself a layer ({type(model).__name__}), and layers are adapted by their names in a "
                "model; put it into one, as nn.Sequential(layer)"
            )
            self.unmatched = {reason: True}

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
        """Note in `unmatched` each entry of an option that names nothing."""
        adaptable = [name for name, module in modules.items() if layer_class(module)]
        by_task = TASK_HEADS.get(config.task_type or "", ())  # peft writes them into its own modules_to_save
        for option, names, hints in (
            ("target_modules", chosen, adaptable),
            ("target_parameters", weights, weights),
            ("exclude_modules", [*adaptable, *chosen, *self._excludable_weights(config, weights)], adaptable),
            ("modules_to_save", modules, modules),
            ("enable_lora", self.layers, self.layers),
        ):
            value = getattr(config, option) or ()
            if isinstance(value, str):
                if value not in BY_KIND and not any(map(matcher(value), names)):
                    meant = value.lower().replace("_", "-")
                    is_spelling = option == "target_modules" and meant in BY_KIND
                    advice = f"; did you mean {meant!r}?" if is_spelling else _regex_hint(value, hints)
                    self.unmatched[f"{option}: {value!r} names no layer to adapt{advice}"] = True
                continue
            matched = {suffix for name in names for suffix in suffixes(name)}
            missing = [entry for entry in value if entry not in matched and entry not in by_task]
            some_fit = option in ("target_modules", "target_parameters", "exclude_modules") and len(missing) < len(
                value
            )
            kind, hint = ("module", near_misses) if names is modules else ("layer to adapt", near_endings)
            kind = "parameter of two or three dimensions" if names is weights else kind
            for entry in missing:
                sentence = f"{option}: {entry!r} names no {kind}{hint(entry, hints)}"
                self.unmatched[sentence] = not some_fit or is_typo(entry, hints)
        self._check_numbers(config, chosen)
        for option in ("rank_pattern", "alpha_pattern"):
            self.unmatched |= {
                f"{option}: {pattern!r} names no adapted layer" + near_misses(pattern, self.names()): True
                for pattern in getattr(config, option) or ()
                if not any(pattern_matches(pattern, name) for name in self.names())
            }
        if not self.names() and not any(self.unmatched.values()):
            both = f": {self.saved_instead[0]!r} {TRAINED_WHOLE}" if self.saved_instead else ""
            both = both or self._what_there_is(config, chosen, modules)
            targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
            self.unmatched[f"target_modules: {targets!r} leaves no layer to adapt{both}"] = True

    def _what_there_is(self, config: LoRAConfig, chosen: Collection[str], modules: Mapping[str, nn.Module]) -> str:
        """Return why no layer is left to adapt, and the kinds of layers that could be, each with a name for it."""
        if chosen:
            first = next(iter(chosen))
            taken = f"; another option takes out {first!r} ({len(chosen)} in all): exclude_modules or modules_to_save"
            has_more = config.target_modules == ALL_LINEAR and more_layers(list(modules.items()), config)
            return f"{taken}; {ALL_LAYERS!r} adapts more layers" if has_more else taken
        said = "".join(f"; {name!r} is left out: {reason}" for name, reason in list(self.left_out.items())[:1])
        kinds: dict[str, list[str]] = {}
        for name, module in modules.items():
            if layer_class(module) and self.saved.keys().isdisjoint((name, *parent_names(name))):
                kinds.setdefault(type(module).__name__, []).append(name)
        if not kinds:
            return f"{said}; there is no layer of a kind that can be adapted: {ADAPTABLE}"
        shown = [f"{len(names)} {kind}, as {most_frequent_ending(names)!r}" for kind, names in kinds.items()]
        if config.target_modules == ALL_LINEAR and more_layers(list(modules.items()), config):
            return f"{said}; say {ALL_LAYERS!r}, or name others in target_modules: {listed(shown, 4)}"
        return f"{said}; name others in target_modules: {listed(shown, 4)}"

    def _check_numbers(self, config: LoRAConfig, chosen: Iterable[str]) -> None:
        """Note in `unmatched` each entry of layers_to_transform and layers_pattern that names nothing."""
        by_ending = [name for name in chosen if name not in config.target_modules]
        segments = _before_numbers(by_ending)
        for pattern in config.layers_pattern or ():
            if all(layer_number(name, [pattern]) is None for name in by_ending):
                hint = near_misses(pattern, segments)
                self.unmatched[f"layers_pattern: {pattern!r} comes before no number in a layer's name{hint}"] = True
        found = {layer_number(name, config.layers_pattern) for name in by_ending}
        numbers = sorted(number for number in found if number is not None)
        hint = f"; there are {listed(list(map(str, numbers)), 10)}" if numbers else "; there are none"
        if not numbers and not config.layers_pattern and segments:  # as in a network that is itself a list of layers
            hint += f" after two segments: say layers_pattern={segments!r}"
        for number in cast(tuple[int, ...], config.layers_to_transform or ()):
            if number not in numbers:
                self.unmatched[f"layers_to_transform: {number} names no layer{hint}"] = True

    @staticmethod
    def _excludable_weights(config: LoRAConfig, weights: Mapping[str, object]) -> list[str]:
        """Return the names that exclude_modules may hold beside layers: targeted parameters and their modules."""
        targeted = matcher(config.target_parameters)
        named = [name for name in weights if targeted(name)]
        return [*named, *(name.rpartition(".")[0] for name in named)]


def _regex_hint(expression: str, names: Iterable[str]) -> str:
    """Return a hint that a string must match whole names, with a list that would match where one does."""
    names = list(names)
    rule = "; a string is a regular expression for the whole name"
    if any(map(matcher([expression]), names)):
        return f"{rule}, a list holds names or their endings: [{expression!r}]"
    return rule + near_endings(expression, names)


def _before_numbers(names: Iterable[str]) -> list[str]:
    """Return the segments that a number follows in some name."""
    pairs = (pair for name in names for pair in itertools.pairwise(name.split(".")))
    return list(dict.fromkeys(segment for segment, following in pairs if following.isdigit()))


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
