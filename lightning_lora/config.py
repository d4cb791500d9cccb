"""LoRAConfig: define and check the options of an adapter."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, NoReturn, Protocol, TypeVar, cast, get_args

from .errors import LoRAError, sentence, shown
from .matching import (
    ALL_LINEAR,
    PATTERNS,
    NameEnd,
    layer_number,
    layer_pattern,
    matcher,
    near_miss,
    near_misses,
    pattern_matches,
    suffix_pattern,
)
from .names import KNOWN_VARIANTS, listed, variant_of_peft

Config = TypeVar("Config")
# Options as other libraries and papers call them, with what they are called here.
OTHER_NAMES = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("alpha", "scaling", "lora_scale"), "lora_alpha"),
    "dropout": "lora_dropout",
    "targets": "target_modules",
}
DEFAULT_VARIANT = "lora"  # the default of `variant`
USE_DORA = "dora"  # the `variant` that use_dora=True means
Bias = Literal["none", "all", "lora_only"]
Init = Literal["gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga"]
# Values of init_lora_weights that let A and B start from the weight; nn/starts.py computes the starts.
STARTS = re.compile(r"pissa|pissa_niter_\d+|olora")
FROM_GRADIENTS = "lora_ga"  # lets A and B start from gradients of the weight; start/lora_ga.py computes the starts
FROM_DATA = ("eva", FROM_GRADIENTS)  # let A and B start from batches; start/from_data.py
# Options of a peft.LoraConfig that describe the adapter's origin and how peft holds it. The model itself tells these.
OF_PEFT_ALONE = (
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "runtime_config"),
)
IGNORED_PEFT_FIELDS = (  # options of a peft.LoraConfig that do not describe the adapter
    *OF_PEFT_ALONE,
    "ensure_weight_tying",  # ties are always kept
    # These belong to another option, and that option is refused.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
)
Task = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
# Names that PEFT adds to modules_to_save for a task, even if the model has no such module.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": (NameEnd("classifier"), NameEnd("score")),
    "TOKEN_CLS": (NameEnd("classifier"), NameEnd("score")),
    "QUESTION_ANS": (NameEnd("qa_outputs"),),
}


EVEN = "an even rank for init_lora_weights='orthogonal'"

LONGEST = 80  # characters of a value in a list of differences: a combined adapter names each layer

LITERAL = re.compile(r"\^?(\w|\\\W)*")  # an expression that is certainly valid, such as a name in rank_pattern

# What an option decides. Code that treats all options of one sort alike asks options_that_decide for them.
Decides = Literal[
    "layers",  # which layers and single parameters are adapted
    "parts",  # which parts of them
    "ranks",  # r and lora_alpha of each layer; LoRAConfig.rank and LoRAConfig.alpha read all of these options
    "scaling",  # what s is, for r and lora_alpha of a layer; LoRAConfig.divisor reads all of these options
    "whole",  # whole tensors and rows: what is trained other than A and B
    "variant",  # the variant
    "variant's own",  # what the variant makes of it
    "start",  # the initial values
    "training",  # nothing of the adapter: how it is trained
]
# How an option and the adapter_config.json of PEFT go together.
InPeft = Literal[
    "same",  # name, value and meaning are PEFT's
    "by tensors",  # PEFT's too, but what is written names exactly what the tensors hold
    "translated",  # code of its own in formats/peft_options.py
    "no",  # PEFT has no such option
]


def _about(decides: Decides, in_peft: InPeft, *, in_files: Literal["always", "if set"] = "always") -> dict[str, str]:
    """Return the metadata of an option's field, from which every list of options is made.

    Args:
        decides: what the option decides.
        in_peft: how it is read from adapter_config.json and written there.
        in_files: "if set" leaves the option at its default out of metadata, as files of versions without it have it.
    """
    return {"decides": decides, "in_peft": in_peft, "in_files": in_files}


class PeftConfig(Protocol):
    """The attribute by which a config of peft is recognised."""

    peft_type: Any


def _naming_unknown_options(cls: type[Config]) -> type[Config]:
    """Let a config's __init__ name the option that an unknown one is likely to be, where Python's names none."""
    init = cls.__init__
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: Config, *args: Any, **options: Any) -> None:
        refuse_unknown_option(f"{cls.__name__}: an option", options, known)
        init(self, *args, **options)

    cast(Any, cls).__init__ = checked
    return cls


@_naming_unknown_options
@dataclass(frozen=True, kw_only=True, repr=False)
class LoRAConfig:
    """Options of a low-rank adapter, W' = W + s * B @ A with s = lora_alpha / r (arXiv:2106.09685).

    Names and defaults are PEFT's. An entry in a list of module names matches a whole name or a dotted suffix of it. A
    string is a regular expression that must match a whole name.

    Args:
        r: rank of A (r, in) and B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r.
        lora_dropout: probability of dropping a feature of the adapter's input in training mode.
        target_modules: the layers to adapt: a list of names, a regular expression, "all-linear" or "all-layers".
        exclude_modules: layers to leave alone even if target_modules names them.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        rank_pattern: another r for some layers, such as {"q_proj": 16}.
        alpha_pattern: another lora_alpha for some layers, with keys as in rank_pattern.
        bias: which biases are trained: "none", "all", or "lora_only", which is those of adapted layers.
        use_rslora: scale by s = lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
        use_dora: DoRA (arXiv:2402.09353): scale each output's weights W + s * B @ A to a trained magnitude.
        variant: what an adapter stores and adds to the weight: "lora", "dora", "loha" or one of your own.
        variant_options: options of your own variant, by name.
        init_lora_weights: how A and B start: True, False, "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga".
        task_type: what the model is for, as in PEFT's files, such as "SEQ_CLS" or "CAUSAL_LM".
        target_parameters: single parameters to adapt, by name or dotted suffix, such as weights of nn.LSTM.
        trainable_token_indices: rows of embeddings or output heads to train, such as those of new tokens.
        layers_to_transform: the number or numbers of the layers (blocks) in which target_modules adapts modules.
        layers_pattern: the name segment that the layer's number follows, such as "layers".
        enable_lora: which of the equal parts of a fused projection are adapted, such as {"qkv": [True, False, True]}.
        autocast_adapter_dtype: keep adapters of float16 and bfloat16 layers in float32.

    Raises:
        LoRAError: a value is not allowed; the message holds it.

    Example::

        >>> config = LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
        >>> config.scaling("layers.0.q_proj"), config.scaling("layers.0.v_proj")
        (2.0, 4.0)
    """

    r: int = field(default=8, metadata=_about("ranks", "same"))
    lora_alpha: float = field(default=8, metadata=_about("ranks", "same"))
    lora_dropout: float = field(default=0.0, metadata=_about("training", "same"))
    target_modules: str | Sequence[str] = field(default=ALL_LINEAR, metadata=_about("layers", "by tensors"))
    exclude_modules: str | Sequence[str] | None = field(default=None, metadata=_about("layers", "by tensors"))
    modules_to_save: Sequence[str] | None = field(default=None, metadata=_about("whole", "by tensors"))
    rank_pattern: Mapping[str, int] | None = field(default=None, metadata=_about("ranks", "same"))
    alpha_pattern: Mapping[str, float] | None = field(default=None, metadata=_about("ranks", "same"))
    bias: Bias = field(default="none", metadata=_about("whole", "same"))
    use_rslora: bool = field(default=False, metadata=_about("scaling", "same"))
    use_dora: bool = field(default=False, metadata=_about("variant", "same", in_files="if set"))
    variant: str = field(default=DEFAULT_VARIANT, metadata=_about("variant", "no", in_files="if set"))
    variant_options: Mapping[str, Any] | None = field(
        default=None, metadata=_about("variant's own", "no", in_files="if set")
    )
    init_lora_weights: bool | Init | str = field(default=True, metadata=_about("start", "translated"))
    task_type: Task | None = field(default=None, metadata=_about("whole", "translated", in_files="if set"))
    target_parameters: Sequence[str] | None = field(
        default=None, metadata=_about("layers", "by tensors", in_files="if set")
    )
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = field(
        default=None, metadata=_about("whole", "by tensors", in_files="if set")
    )
    layers_to_transform: int | Sequence[int] | None = field(
        default=None, metadata=_about("layers", "by tensors", in_files="if set")
    )
    layers_pattern: str | Sequence[str] | None = field(
        default=None, metadata=_about("layers", "by tensors", in_files="if set")
    )
    enable_lora: Mapping[str, Sequence[bool]] | None = field(default=None, metadata=_about("parts", "no"))
    autocast_adapter_dtype: bool = field(default=True, metadata=_about("training", "no"))

    def __post_init__(self) -> None:
        self._normalise()
        for option, is_allowed, expected in RULES:
            name = option.removesuffix("[]")
            value = getattr(self, name)
            if value is None and getattr(LoRAConfig, name) is None:  # an optional one at its default
                continue
            values = {option: value} if name == option else {f"{name}[{key!r}]": each for key, each in value.items()}
            for where, each in values.items():
                if not is_allowed(each, self):
                    raise LoRAError(f"LoRAConfig: {where} must be {expected.format(c=self)}, but it is {shown(each)}.")
        self._check_expressions()
        self._check_variant()

    def __repr__(self) -> str:
        given = (f"{name}={getattr(self, name)!r}" for name in self.differing(LoRAConfig()))
        return f"{type(self).__name__}({', '.join(given)})"

    def rank(self, name: str) -> int:
        """Return r of the layer `name`."""
        if not self.rank_pattern:
            return self.r
        return next((r for key, r in self.rank_pattern.items() if pattern_matches(key, name)), self.r)

    def alpha(self, name: str) -> float:
        """Return lora_alpha of the layer `name`."""
        if not self.alpha_pattern:
            return self.lora_alpha
        alphas = self.alpha_pattern.items()
        return next((alpha for key, alpha in alphas if pattern_matches(key, name)), self.lora_alpha)

    def scaling(self, name: str) -> float:
        """Return s of the layer `name`."""
        return self.scaling_of(self.rank(name), self.alpha(name))

    def scaling_of(self, rank: int, alpha: float) -> float:
        """Return s of a layer with this r and lora_alpha."""
        return alpha / self.divisor(rank)

    def alpha_of(self, rank: int, scaling: float) -> float:
        """Return lora_alpha of a layer with this r and s, without the rounding of an s that was computed from one."""
        alpha = float(f"{scaling * self.divisor(rank):.12g}")
        return int(alpha) if alpha.is_integer() else alpha

    def divisor(self, rank: int) -> float:
        """Return what lora_alpha of a layer of this rank is divided by: r, or with use_rslora its square root."""
        return math.sqrt(rank) if self.use_rslora else rank

    def enabled_parts(self, name: str) -> tuple[bool, ...] | None:
        """Return for each part of the fused projection `name` whether it is adapted; None for a layer without parts."""
        enabled = (self.enable_lora or {}).items()
        return next((tuple(parts) for entry, parts in enabled if f".{name}".endswith(f".{entry}")), None)

    @property
    def has_start(self) -> bool:
        """Whether the product of the initial A and B is subtracted, W' = W + s * (B @ A - B0 @ A0)."""
        return starts_from_weight(self.init_lora_weights) or self.init_lora_weights == FROM_GRADIENTS

    @property
    def names_no_layer(self) -> bool:
        """Whether target_modules is [] and there are no target_parameters: nothing gets A and B."""
        return not self.target_modules and not self.target_parameters

    def target(self) -> Callable[[str], bool]:
        """Return a function that tells whether target_modules and layers_to_transform name a module, by PEFT's rule.

        A module that target_modules names in full is named in any layer.
        """
        named, numbers = matcher(self.target_modules), cast("tuple[int, ...] | None", self.layers_to_transform)
        if numbers is None:
            return named
        patterns, whole = self.layers_pattern, frozenset(self.target_modules)
        return lambda name: name in whole or (named(name) and layer_number(name, patterns) in numbers)

    def all_modules_to_save(self) -> list[str]:
        """Return the entries of modules_to_save and the names that task_type adds; the model may lack the latter."""
        return list(dict.fromkeys((*(self.modules_to_save or ()), *TASK_HEADS.get(self.task_type or "", ()))))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain types, for checkpoints and JSON.

        Options of LEFT_OUT_AT_DEFAULT are left out at their defaults.
        """
        options = {name: _plain(value) for name, value in asdict(self).items()}
        if self.use_dora:
            del options["variant"]
        for name, default in LEFT_OUT_AT_DEFAULT.items():
            if name in options and options[name] == default:
                del options[name]
        return options

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoRAConfig:
        """Build a config from what to_dict returned.

        Raises:
            LoRAError: `options` is no mapping, an option is unknown, or a value is not allowed. The message names it.
        """
        if not isinstance(options, Mapping):
            _refuse("the options", "a mapping", options)
        refuse_unknown_option("LoRAConfig: an option", options, [option.name for option in fields(cls)])
        return cls(**options)

    @classmethod
    def from_peft(cls, config: Any) -> LoRAConfig:
        """Translate a peft.LoraConfig, or PEFT's config of another known variant.

        Args:
            config: a config of any version of PEFT. Options that do not describe the adapter are ignored.

        Raises:
            LoRAError: `config` is no such config, or it sets an option that LoRAConfig does not have. The message names
                the option.

        Example::

            >>> import peft
            >>> LoRAConfig.from_peft(peft.LoraConfig(r=4, target_modules=["q_proj"]))
            LoRAConfig(r=4, target_modules=('q_proj',))
        """
        variant = variant_of_peft(getattr(config, "peft_type", None))
        if variant is None or not is_dataclass(config):
            raise LoRAError(f"LoRAConfig.from_peft: expected a peft.LoraConfig, found a {type(config).__name__}.")
        try:
            options = variant.options_from_peft({each.name: getattr(config, each.name) for each in fields(config)})
        except ValueError as error:
            raise LoRAError(f"LoRAConfig.from_peft: {sentence(error)}") from None
        if isinstance(options["modules_to_save"], list):
            options["modules_to_save"] = list(map(NameEnd, options["modules_to_save"]))
        own = {name: options[name] for name in variant.own_options}
        shared = [option.name for option in fields(cls) if option.name in options]
        understood = {*shared, *own, *IGNORED_PEFT_FIELDS}
        for theirs in fields(config):
            default = theirs.default if theirs.default_factory is MISSING else theirs.default_factory()
            if theirs.name in options and theirs.name not in understood and options[theirs.name] != default:
                raise LoRAError(
                    f"LoRAConfig.from_peft: {theirs.name}={options[theirs.name]!r} cannot be expressed; the options "
                    f"are {', '.join(shared)}."
                )
        if options["target_modules"] is None:
            raise LoRAError(
                "LoRAConfig.from_peft: target_modules=None lets peft choose by the model's type; name the layers, or "
                "say 'all-linear'."
            )
        asked = {"variant": variant.name, "variant_options": own} if variant.name != DEFAULT_VARIANT else {}
        return cls(**{name: options[name] for name in shared}, **asked)

    def differing(self, config: LoRAConfig) -> list[str]:
        """Return the names of the options in which two configs differ. The order of names in a list is ignored."""
        names = [option.name for option in fields(self)]
        if {self.variant, config.variant} <= {DEFAULT_VARIANT, USE_DORA}:
            names.remove("variant")  # use_dora then differs too, and one name is enough
        return [name for name in names if _unordered(getattr(self, name)) != _unordered(getattr(config, name))]

    def differences(self, now: LoRAConfig) -> list[str]:
        """Describe each option that differs in another config: its value here, and its value in `now`."""
        return [
            f"{name} was {shown(getattr(self, name), LONGEST)}, now {shown(getattr(now, name), LONGEST)}"
            for name in self.differing(now)
        ]

    def _normalise(self) -> None:
        """Copy values into immutable ones, because the caller may change them; an empty collection becomes None."""
        new = {option.name: _immutable(getattr(self, option.name)) for option in fields(self)}
        for option in ("layers_to_transform", "layers_pattern"):
            if isinstance(new[option], (int, str)):
                new[option] = (new[option],) if new[option] != "" else None
        if isinstance(parts := new["enable_lora"], dict):
            new["enable_lora"] = {name: _immutable(each) for name, each in parts.items()}
        rows = new["trainable_token_indices"]
        is_by_table = isinstance(rows, dict)
        rows = {name: _ascending(each) for name, each in rows.items()} if is_by_table else _ascending(rows)
        new["trainable_token_indices"] = rows
        if self.variant == USE_DORA or (self.use_dora is True and self.variant == DEFAULT_VARIANT):
            new |= {"variant": USE_DORA, "use_dora": True}
        for option, value in new.items():
            is_empty = isinstance(value, (tuple, dict)) and not value and option != "target_modules"
            object.__setattr__(self, option, None if is_empty else value)

    def _check_expressions(self) -> None:
        """Refuse a text that is no regular expression, alone or inside the larger expression that holds it."""
        names = [(option, getattr(self, option), str) for option in ("target_modules", "exclude_modules")]
        checks: list[tuple[str, Any, Callable[[str], str]]] = [each for each in names if isinstance(each[1], str)]
        checks += [("layers_pattern", pattern, layer_pattern) for pattern in self.layers_pattern or ()]
        checks += [(o, key, suffix_pattern) for o in PATTERNS for key in getattr(self, o) or ()]
        for option, pattern, whole in checks:
            if isinstance(pattern, str) and LITERAL.fullmatch(pattern):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", DeprecationWarning)  # Python 3.10 warns where 3.11 refuses
                    re.compile(pattern)
                    re.compile(whole(pattern))
            except (re.error, TypeError, OverflowError, RecursionError, DeprecationWarning) as error:
                raise LoRAError(
                    f"LoRAConfig: {option}: {shown(pattern)} is not a regular expression: {error}."
                ) from error

    def _check_variant(self) -> None:
        """Check variant and variant_options, drop those at their defaults, and ask the variant about other options."""
        if not isinstance(self.variant, str) or self.variant not in KNOWN_VARIANTS:
            known = listed(sorted(map(repr, KNOWN_VARIANTS)), len(KNOWN_VARIANTS))
            hint = near_misses(self.variant, KNOWN_VARIANTS) if isinstance(self.variant, str) else ""
            hint = hint if "did you mean" in hint else ""
            expected = f"one of {known} (import the file that defines another one first{hint})"
            _refuse("variant", expected, self.variant)
        defaults = KNOWN_VARIANTS[self.variant].own_options
        given = self.variant_options or {}
        refuse_unknown_option("LoRAConfig: variant_options: an option", given, defaults)
        for name, value in given.items():
            default = defaults[name]
            if isinstance(default, float) and not is_number(value):
                _refuse(f"variant_options[{name!r}]", "a finite number", value)
            if not isinstance(default, float) and type(value) is not type(default):
                _refuse(f"variant_options[{name!r}]", type(default).__name__, value)
        changed = {name: value for name, value in given.items() if value != defaults[name]}
        object.__setattr__(self, "variant_options", changed or None)
        why_not = KNOWN_VARIANTS[self.variant].why_not_with(self) if self.variant != DEFAULT_VARIANT else ""
        if why_not:
            raise LoRAError(f"LoRAConfig: {why_not}.")

    def all_variant_options(self) -> dict[str, Any]:
        """Return all options that the variant alone has, with their values or defaults."""
        return {**KNOWN_VARIANTS[self.variant].own_options, **(self.variant_options or {})}


for _option in fields(LoRAConfig):
    if not _option.metadata:
        raise TypeError(f"LoRAConfig.{_option.name} must be field(default=..., metadata=_about(...)).")

# Options that files leave out at their default, with that default.
LEFT_OUT_AT_DEFAULT = {each.name: each.default for each in fields(LoRAConfig) if each.metadata["in_files"] == "if set"}
# By their types, which are texts here because annotations are not evaluated.
SWITCHES = tuple(each.name for each in fields(LoRAConfig) if each.type == "bool")
MAPPINGS = tuple(each.name for each in fields(LoRAConfig) if str(each.type).startswith("Mapping["))


def options_that_decide(*what: Decides) -> tuple[str, ...]:
    """Return the names of the options that decide one of these things, in the order of LoRAConfig.

    Example::

        >>> options_that_decide("ranks", "scaling")
        ('r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora')
    """
    return tuple(each.name for each in fields(LoRAConfig) if each.metadata["decides"] in what)


def defaults_of(*what: Decides) -> dict[str, Any]:
    """Return the options that decide one of these things, at their defaults.

    Example::

        >>> defaults_of("scaling")
        {'use_rslora': False}
    """
    return {name: getattr(LoRAConfig, name) for name in options_that_decide(*what)}


def options_in_peft(how: InPeft) -> tuple[str, ...]:
    """Return the names of the options that go together with adapter_config.json in this way.

    Example::

        >>> options_in_peft("no")
        ('variant', 'variant_options', 'enable_lora', 'autocast_adapter_dtype')
    """
    return tuple(each.name for each in fields(LoRAConfig) if each.metadata["in_peft"] == how)


def is_config(config: object) -> bool:
    """Return whether an object is a LoRAConfig or any config of peft; as_config refuses some of peft's."""
    return isinstance(config, LoRAConfig) or hasattr(config, "peft_type")


def as_config(config: LoRAConfig | PeftConfig) -> LoRAConfig:
    """Return a LoRAConfig unchanged; translate a peft.LoraConfig.

    Raises:
        LoRAError: it is a config of another class, or has an option that cannot be expressed.
    """
    return config if isinstance(config, LoRAConfig) else LoRAConfig.from_peft(config)


def starts_from_weight(init: object) -> bool:
    """Return whether a value of init_lora_weights lets A and B start from the weight."""
    return isinstance(init, str) and STARTS.fullmatch(init) is not None


def _unordered(value: Any) -> Any:
    """Return a tuple as a set, and any other value unchanged."""
    return frozenset(value) if isinstance(value, tuple) else value


def _immutable(value: Any) -> Any:
    """Return numbers and enums as Python's own values, and collections as tuples and dicts of such numbers."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Enum):  # peft.TaskType
        return value.value
    if isinstance(value, Mapping):
        return {key: plain_number(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    return tuple(map(plain_number, value)) if isinstance(value, (list, tuple)) else plain_number(value)


def _ascending(rows: Any) -> Any:
    """Return whole numbers of a collection in ascending order, as a tuple; other values unchanged."""
    rows = _immutable(rows)
    return tuple(sorted(rows)) if _are_indices(rows) else rows


def _plain(value: Any) -> Any:
    """Return tuples as lists, also inside mappings and tuples, and each NameEnd as a str."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, NameEnd):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def refuse_unknown_option(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise LoRAError for the first option that is unknown, with the name that it is likely to have.

    Args:
        where: what the options were given to, for the message.
        given: the names of the options that were given.
        known: those that there are.
    """
    known = list(known)
    unknown = [name for name in map(str, given) if name not in known]
    if unknown:
        called = OTHER_NAMES.get(unknown[0])
        hint = f" (did you mean {called!r}?)" if called in known else near_miss(unknown[0], known)
        raise LoRAError(f"{where} is unknown: {unknown[0]!r}{hint}; there are {', '.join(known)}.")


def _refuse(option: str, expected: str, value: object) -> NoReturn:
    raise LoRAError(f"LoRAConfig: {option} must be {expected}, but it is {shown(value)}.")


def plain_number(value: Any) -> Any:
    """Return a number, such as one of numpy, as an int or float that every file can hold; other values unchanged."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float."""
    # math.isfinite would raise for a whole number beyond the range of floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_indices(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_index, value))


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)


def _are_rows(value: object) -> bool:
    """Return whether a value of trainable_token_indices is a list of rows, or one for each table."""
    if isinstance(value, Mapping):
        return _are_names(tuple(value)) and all(rows and _are_indices(rows) for rows in value.values())
    return _are_indices(value)


def _are_different(rows: Any) -> bool:
    return all(len(set(each)) == len(each) for each in (rows.values() if isinstance(rows, Mapping) else [rows]))


def _are_parts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, bool) for part in value) and any(value)


# Each rule: an option, or the values of a mapping; whether a value is allowed in a config; what it must be.
RULES: tuple[tuple[str, Callable[[Any, LoRAConfig], object], str], ...] = (
    ("r", lambda v, c: _is_index(v) and v > 0, "a whole number of at least 1"),
    ("lora_alpha", lambda v, c: is_number(v) and v > 0, "a finite number above 0"),
    ("lora_dropout", lambda v, c: is_number(v) and 0 <= v < 1, "a probability in [0, 1)"),
    ("lora_dropout", lambda v, c: not v or not c.target_parameters, "0 with target_parameters, which have no input"),
    (
        "target_modules",
        lambda v, c: v if isinstance(v, str) else _are_names(v),
        "a list of names, a regular expression, 'all-linear' or 'all-layers'",
    ),
    ("exclude_modules", lambda v, c: isinstance(v, str) or _are_names(v), "a list of names or a regular expression"),
    ("modules_to_save", lambda v, c: _are_names(v), "a list of module names"),
    ("target_parameters", lambda v, c: _are_names(v), "a list of parameter names"),
    ("layers_to_transform", lambda v, c: _are_indices(v), "a whole number from 0 or a list of them"),
    ("layers_pattern", lambda v, c: _are_names(v), "a name, a regular expression or a list of them"),
    ("layers_pattern", lambda v, c: c.layers_to_transform is not None, "left out, for there is no layers_to_transform"),
    (
        "target_modules",
        lambda v, c: not isinstance(v, str) or c.layers_to_transform is None,
        "a list of names where layers_to_transform is given, as in PEFT",
    ),
    ("trainable_token_indices", lambda v, c: _are_rows(v), "a list of whole numbers from 0, or one for each table"),
    ("trainable_token_indices", lambda v, c: _are_different(v), "without a number twice"),
    *((option, lambda v, c: isinstance(v, Mapping), "a mapping") for option in MAPPINGS),
    ("rank_pattern[]", lambda v, c: _is_index(v) and v > 0, "a whole number of at least 1"),
    ("alpha_pattern[]", lambda v, c: is_number(v) and v > 0, "a finite number above 0"),
    ("enable_lora", lambda v, c: _are_names(tuple(v)), "a mapping from names"),
    ("enable_lora[]", lambda v, c: _are_parts(v), "a list of booleans with at least one true"),
    ("task_type", lambda v, c: v in get_args(Task), f"one of {', '.join(get_args(Task))}"),
    ("bias", lambda v, c: v in get_args(Bias), f"one of {', '.join(get_args(Bias))}"),
    *((option, lambda v, c: isinstance(v, bool), "true or false") for option in SWITCHES),
    (
        "init_lora_weights",
        lambda v, c: isinstance(v, bool) or v in get_args(Init) or starts_from_weight(v),
        "true, false, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_4' (or another number), 'olora', 'eva' or "
        "'lora_ga'",
    ),
    ("r", lambda v, c: c.init_lora_weights != "orthogonal" or v % 2 == 0, EVEN),
    ("rank_pattern[]", lambda v, c: c.init_lora_weights != "orthogonal" or v % 2 == 0, EVEN),
    ("use_dora", lambda v, c: not v or c.variant == USE_DORA, "left out with variant={c.variant!r}"),
)

for _option in fields(LoRAConfig):
    if _option.name not in {rule[0].removesuffix("[]") for rule in RULES} | {"variant"}:  # which _check_variant checks
        raise TypeError(f"LoRAConfig.{_option.name} has no rule in RULES, so no value of it would be refused.")
