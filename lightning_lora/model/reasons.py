"""Why a layer, a table of trained rows or a single parameter cannot be adapted: one table of reasons for the three."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..config import LoRAConfig
from ..distributed.sharding import is_sharded
from ..errors import LoRAError
from ..matching import matcher
from ..names import A, canonical, join_names
from ..nn.adapted_module import NamedModules, Swapped, adapters_in
from ..nn.foreign_linear import is_foreign_linear, is_packed
from ..nn.layer_kinds import ADAPTABLE, layer_class
from ..nn.lora_layer import LoRALayer
from ..nn.low_rank import ATTENTION_WEIGHTS, FUSABLE, MERGEABLE_DTYPES, matrix_shape
from ..nn.parameter import LoRAParameterHolder, weights_of
from ..nn.quantized import quantized_as, quantized_parameters, shape_of, was_never_quantized
from ..nn.token_rows import is_table
from ..nn.variant import variant_of
from .heads import option_that_leaves_plain, short_name, to_train_whole

LAYER, TABLE, PARAMETER = EVERY = ("target_modules", "trainable_token_indices", "target_parameters")
REMEDY = {
    LAYER: "leave it out with exclude_modules=[{c.name!r}]",
    TABLE: "leave it out of trainable_token_indices",
    PARAMETER: "leave it out of target_parameters",
}


@dataclass(frozen=True)
class Candidate:
    """What is about to be adapted.

    Attributes:
        option: that names it: LAYER, TABLE or PARAMETER.
        name: of the layer, table or parameter in the model.
        module: the layer or table, or the module that holds the parameter.
        config: the options.
        leaf: the name of the weight in the module.
        rows: ascending numbers of the trained rows of a table.
        also: another option that names it; "" for none.
    """

    option: str
    name: str
    module: nn.Module
    config: LoRAConfig
    leaf: str = "weight"
    rows: tuple[int, ...] = ()
    also: str = ""

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @cached_property
    def adapting(self) -> type[LoRALayer] | None:
        """The class that adapts such a layer, or None."""
        return layer_class(self.module)

    @property
    def is_foreign(self) -> bool:
        """Whether it is a linear layer of another library, whose own forward alone reads its weight."""
        return self.option == LAYER and is_foreign_linear(self.module)

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The weights that would be adapted; all parameters of a foreign linear layer."""
        if self.is_foreign:
            return list(self.module.parameters())
        is_attention = self.option == LAYER and isinstance(self.module, nn.MultiheadAttention)
        leaves = ATTENTION_WEIGHTS if is_attention else (self.leaf,)
        own = self.module._parameters
        return [weight for leaf in leaves if (weight := own.get(leaf)) is not None]

    @cached_property
    def quantized(self) -> str:
        """How a weight is quantized, or ""."""
        return next(filter(None, map(quantized_as, self.weights)), "")

    def why_not(self) -> str:
        """Return why it cannot be adapted, or ""."""
        for options, holds, words in REASONS:
            if self.option in options and (found := holds(self)):
                return words.format(c=self, found=found)
        return ""

    def refuse(self) -> None:
        """Raise LoRAError if a reason holds. The message says what to do."""
        if reason := self.why_not():
            remedy = REMEDY[self.option].format(c=self)
            raise LoRAError(f"inject: {self.name!r}: {reason}{', or' if '; ' in reason else ';'} {remedy}.")


def _names_inside(c: Candidate) -> str:
    """Say why a module of this class is no layer, and what could be named inside it."""
    inside = [name for name, module in c.module.named_modules() if name and layer_class(module)]
    said = f"a {type(c.module).__module__}.{c.kind} cannot be adapted, only {ADAPTABLE} and their subclasses can"
    if inside:
        return f"{said}; name the layers inside it, as {inside[0]!r}"
    parameters = [f"{c.name}.{leaf}" for leaf in weights_of({"": c.module})]
    return f"{said}; name its parameters in target_parameters={parameters}" if parameters else said


def _why_not_in_parts(c: Candidate) -> str:
    """Return why enable_lora cannot have its parts of a layer, or ""."""
    parts, adapting = c.config.enabled_parts(c.name), cast(type[LoRALayer], c.adapting)
    if parts is None:
        return ""
    if adapting.KIND not in FUSABLE or c.is_foreign:
        return f"enable_lora needs a linear layer{' of torch' if c.is_foreign else ''}, not a {c.kind}"
    outputs = sum(matrix_shape(adapting.KIND, shape_of(weight))[0] for weight in c.weights)  # attention may have three
    if outputs % len(parts) == 0:
        return ""
    return f"enable_lora has {len(parts)} parts, which do not divide its {outputs} outputs"


def _why_not_with_variant(c: Candidate) -> str:
    """Return why the variant cannot adapt a layer, or ""."""
    variant = variant_of(c.config)
    adapting = layer_class(c.module, variant)
    if adapting is None:
        quantized = f" whose weight is quantized ({c.quantized})" if c.quantized else ""
        unread = ", whose weight only its own forward reads" if c.is_foreign else ""
        option = f"init_lora_weights={c.config.init_lora_weights!r}" if c.config.has_start else variant.option
        return f"{option} cannot adapt a {c.kind}{quantized}{unread}"
    return variant.why_not_on(c.module, adapting.KIND, c.config)


def _why_not_so_many_rows(c: Candidate) -> str:
    size, last = shape_of(c.weights[0])[0], c.rows[-1]
    return (
        f"it has {size} rows and none of number {last}; resize it first, or correct the number" if last >= size else ""
    )


Reason = tuple[tuple[str, ...], Callable[[Candidate], object], str]
REASONS: tuple[Reason, ...] = (  # which candidates it concerns, a test, and words; "; " begins a remedy in them
    (
        EVERY,
        lambda c: isinstance(c.module, torch.jit.ScriptModule),
        "TorchScript has compiled its forward, which would ignore the adapter; build it without torch.jit",
    ),
    ((LAYER,), lambda c: c.adapting is None and _names_inside(c), "{found}"),
    (
        (TABLE,),
        lambda c: not is_table(c.module),
        "a {c.kind} is no table: only nn.Embedding and nn.Linear have rows that can be trained",
    ),
    (EVERY, lambda c: c.also, "it is in {found} too; adapt it in one of the two ways"),
    (
        (TABLE, PARAMETER),
        lambda c: isinstance(c.module, Swapped) and not isinstance(c.module, LoRAParameterHolder),
        "its {c.kind} is adapted as a layer, or reads the weight of one; adapt one of the two",
    ),
    (
        (LAYER, TABLE),
        lambda c: hasattr(c.module, A),
        "the {c.kind} has a lora_A of another library; take that out first",
    ),
    (
        EVERY,
        lambda c: "forward" in vars(c.module),
        "its forward is replaced on the instance of {c.kind}, which would ignore the adapter; undo that",
    ),
    (
        (TABLE,),
        lambda c: getattr(c.module, "scale_grad_by_freq", False),
        "scale_grad_by_freq counts rows in the whole table, but trained rows lie apart; turn it off",
    ),
    (
        (LAYER, TABLE),
        lambda c: getattr(c.module, "max_norm", None) is not None,
        "max_norm renormalises its rows in place; set it to None",
    ),
    (
        (LAYER, TABLE),
        lambda c: not c.is_foreign and (is_parametrized(c.module) or not c.weights),
        "the weight of the {c.kind} is computed from others (weight_norm, parametrize); remove that first",
    ),
    (
        EVERY,
        lambda c: (c.option == PARAMETER or not isinstance(c.module, nn.Linear)) and c.quantized,
        "its weight is quantized ({found}), and a quantized weight is adapted in linear layers only",
    ),
    (
        EVERY,
        lambda c: not c.quantized and any(is_sharded(w) or getattr(w, "_fsdp_flattened", False) for w in c.weights),
        "the weight of the {c.kind} is sharded already; call inject(model, LoRAConfig(...)) in configure_model, after "
        "the layers are built and before fully_shard, parallelize_module or wrap",
    ),
    (
        EVERY,
        lambda c: (
            not (c.quantized or c.is_foreign)
            and next((w.dtype for w in c.weights if w.dtype not in MERGEABLE_DTYPES), None)
        ),
        "its weight is {found}, and adapters need float16, bfloat16, float32 or float64",
    ),
    (
        (LAYER,),
        lambda c: (
            c.is_foreign
            and c.config.bias != "none"
            and isinstance(bias := getattr(c.module, "bias", None), torch.Tensor)
            and not isinstance(bias, nn.Parameter)
        ),
        "the bias of the {c.kind} is no parameter, so that bias={c.config.bias!r} cannot train it; set bias='none'",
    ),
    (
        (PARAMETER,),
        lambda c: not c.weights[0].is_contiguous(),
        "its values do not follow each other in memory; make it contiguous",
    ),
    ((LAYER,), _why_not_in_parts, "{found}"),
    ((LAYER,), _why_not_with_variant, "{found}"),
    ((TABLE,), _why_not_so_many_rows, "{found}"),
)


def check_unadapted(modules: NamedModules) -> None:
    """Refuse a model that has adapters already, because injection would freeze or hide them.

    Raises:
        LoRAError: a module has an adapter of this package, of peft or of loralib.
    """
    model = modules[0][1]
    for name, module in modules:
        library = type(module).__module__.partition(".")[0]
        if any(adapter.has_trained_adapter() for adapter in adapters_in(module).values()):
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


def refuse_never_quantized(modules: NamedModules, config: LoRAConfig, verb: str) -> None:
    """Refuse a model with layers of bitsandbytes that have no quantized weight when a fit starts: they cannot run.

    Args:
        modules: every module of the model under its first name, the model first.
        config: the options.
        verb: the beginning of the message.

    Raises:
        LoRAError: there is such a layer. The message has both options to copy.
    """
    name, layer = next(((name, module) for name, module in modules if was_never_quantized(module)), ("", None))
    if layer is not None:
        raise LoRAError(f"{verb}: the weight of {name!r} {_never(layer)}. {_remedy(modules, config, layer)}")


def check_trainable(modules: NamedModules, saved: Mapping[str, nn.Module], config: LoRAConfig) -> None:
    """Refuse to train a module whole that holds a quantized weight, because that takes no gradient.

    A layer of bitsandbytes whose weight was never quantized is refused too, because it cannot run. transformers makes
    such a layer of a head that the checkpoint lacks.

    Args:
        modules: every module of the model under its first name, the model first.
        saved: the modules that are to be fully trained, by name.
        config: the options.

    Raises:
        LoRAError: a module holds such a layer. The message has both options to copy.
    """
    for name, module in saved.items():
        for inside, layer in module.named_modules(remove_duplicate=False):
            if is_packed(layer):
                raise LoRAError(
                    f"inject: {name!r} is to be fully trained, but {canonical(join_names(name, inside))!r} in it is a "
                    f"{type(layer).__name__} with packed weights, which take no gradient. Leave it out of "
                    "modules_to_save and adapt it, or build it unquantized."
                )
            kind = next(map(quantized_as, quantized_parameters(layer).values()), "")
            if not kind and not was_never_quantized(layer):
                continue
            problem = f"is quantized ({kind}) and cannot be trained" if kind else _never(layer)
            by_name = matcher(config.modules_to_save)(name)
            asked = "modules_to_save names" if by_name else f"task_type={config.task_type!r} asks for"
            where = canonical(join_names(name, inside))
            raise LoRAError(
                f"inject: {asked} {name!r}, but the weight of {where!r} {problem}. {_remedy(modules, config, layer)}"
            )


def _never(layer: nn.Module) -> str:
    return f"is not quantized, as the checkpoint lacks it, and a {type(layer).__name__} cannot run with it"


def _remedy(modules: NamedModules, config: LoRAConfig, layer: nn.Module) -> str:
    """Return the sentence with both options to copy."""
    entries = config.all_modules_to_save()
    names = to_train_whole(modules, entries)
    lacking = [short_name(name, modules) for name in names if not matcher(entries)(name)]
    whole = [*(config.modules_to_save or ()), *lacking]
    train = f"Train what is new whole, with modules_to_save={whole}, and leave" if lacking else "Leave"
    return f"{train} it out of the quantization: {option_that_leaves_plain(modules, names, layer)}."
