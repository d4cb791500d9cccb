"""LoRAConfig: define and check the options of an adapter."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
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
from .names import KNOWN_VARIANTS, listed

Config = TypeVar("Config")
# Options as other libraries and papers call them, with what they are called here.
OTHER_NAMES = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("alpha", "scaling", "lora_scale"), "lora_alpha"),
    "dropout": "lora_dropout",
    "targets": "target_modules",
}
VARIANTS = ("use_dora",)  # options that ask for a variant, as `variant` does
PLAIN = "lora"  # the default of `variant`
BY_OPTION = "dora"  # the `variant` that use_dora=True means
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


def tasks_with(heads: Collection[str]) -> list[str]:
    """Return the values of task_type that add all of these modules to modules_to_save."""
    return [task for task, added in TASK_HEADS.items() if all(map(matcher(added), heads))]


MAPPINGS = (*PATTERNS, "enable_lora", "variant_options")  # options
SWITCHES = ("use_rslora", *VARIANTS, "autocast_adapter_dtype")  # options
EVEN = "an even rank for init_lora_weights='orthogonal'"

LONGEST = 80  # characters of a value in a list of differences: a combined adapter names each layer

LITERAL = re.compile(r"\^?(\w|\\\W)*")  # an expression that is certainly valid, such as a name in rank_pattern

LEFT_OUT_AT_DEFAULT = {  # options that files leave out at their default, with that default
    **dict.fromkeys(("target_parameters", "layers_to_transform", "layers_pattern", "task_type")),
    "trainable_token_indices": None,
    "use_dora": False,
    "variant": PLAIN,
    "variant_options": None,
}


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

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    bias: Bias = "none"
    use_rslora: bool = False
    use_dora: bool = False
    variant: str = PLAIN
    variant_options: Mapping[str, Any] | None = None
    init_lora_weights: bool | Init | str = True
    task_type: Task | None = None
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    enable_lora: Mapping[str, Sequence[bool]] | None = None
    autocast_adapter_dtype: bool = True

    def __post_init__(self) -> None:
        self._normalise()
        for option, is_allowed, expected in RULES:
            for name, value in _values(self, option):
                if not is_allowed(value, self):
                    raise LoRAError(f"LoRAConfig: {name} must be {expected.format(c=self)}, but it is {shown(value)}.")
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
        return scaling_of(self.rank(name), self.alpha(name), rslora=self.use_rslora)

    def enabled_parts(self, name: str) -> tuple[bool, ...] | None:
        """Return for each part of the fused projection `name` whether it is adapted; None for a layer without parts."""
        enabled = (self.enable_lora or {}).items()
        return next((tuple(parts) for entry, parts in enabled if f".{name}".endswith(f".{entry}")), None)

    @property
    def has_start(self) -> bool:
        """Whether the product of the initial A and B is subtracted, W' = W + s * (B @ A - B0 @ A0)."""
        return is_start(self.init_lora_weights) or self.init_lora_weights == FROM_GRADIENTS

    @property
    def names_no_layer(self) -> bool:
        """Whether target_modules is [] and there are no target_parameters: nothing gets A and B."""
        return not self.target_modules and not self.target_parameters

    def target(self) -> Callable[[str], bool]:
        """Return whether target_modules and layers_to_transform name a module, as a function of its name, as in PEFT.

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

        Rarely used options are left out at their defaults, see LEFT_OUT_AT_DEFAULT.
        """
        options, left_out = {name: _plain(value) for name, value in asdict(self).items()}, LEFT_OUT_AT_DEFAULT
        if self.use_dora:
            del options["variant"]
        return {name: value for name, value in options.items() if name not in left_out or value != left_out[name]}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoRAConfig:
        """Build a config from what to_dict returned.

        Raises:
            LoRAError: `options` is no mapping, an option is unknown, or a value is not allowed. The message names it.
        """
        if not isinstance(options, Mapping):
            _refuse("the options", "a mapping", options)
        refuse_unknown_option("LoRAConfig: an option", options, [field.name for field in fields(cls)])
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
        peft_type = getattr(config, "peft_type", None)
        variant = next((each for each in KNOWN_VARIANTS.values() if peft_type and each.peft_type == peft_type), None)
        if variant is None or not is_dataclass(config):
            raise LoRAError(f"LoRAConfig.from_peft: expected a peft.LoraConfig, found a {type(config).__name__}.")
        try:
            options = variant.options_from_peft({field.name: getattr(config, field.name) for field in fields(config)})
        except ValueError as error:
            raise LoRAError(f"LoRAConfig.from_peft: {sentence(error)}") from None
        if isinstance(options["modules_to_save"], list):
            options["modules_to_save"] = list(map(NameEnd, options["modules_to_save"]))
        own = {name: options[name] for name in variant.own_options}
        shared = [field.name for field in fields(cls) if field.name in options]
        for field in fields(config):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            understood = {*shared, *own, *IGNORED_PEFT_FIELDS}
            if field.name in options and field.name not in understood and options[field.name] != default:
                raise LoRAError(
                    f"LoRAConfig.from_peft: {field.name}={options[field.name]!r} cannot be expressed; the options are "
                    f"{', '.join(shared)}."
                )
        if options["target_modules"] is None:
            raise LoRAError(
                "LoRAConfig.from_peft: target_modules=None lets peft choose by the model's type; name the layers, or "
                "say 'all-linear'."
            )
        asked = {"variant": variant.name, "variant_options": own} if variant.name != PLAIN else {}
        return cls(**{name: options[name] for name in shared}, **asked)

    def differing(self, config: LoRAConfig) -> list[str]:
        """Return the names of the options in which two configs differ. The order of names in a list is ignored."""
        names = [field.name for field in fields(self)]
        if {self.variant, config.variant} <= {PLAIN, BY_OPTION}:
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
        new = {field.name: _immutable(getattr(self, field.name)) for field in fields(self)}
        for option in ("layers_to_transform", "layers_pattern"):
            if isinstance(new[option], (int, str)):
                new[option] = (new[option],) if new[option] != "" else None
        if isinstance(parts := new["enable_lora"], dict):
            new["enable_lora"] = {name: _immutable(each) for name, each in parts.items()}
        rows = new["trainable_token_indices"]
        is_by_table = isinstance(rows, dict)
        rows = {name: _ascending(each) for name, each in rows.items()} if is_by_table else _ascending(rows)
        new["trainable_token_indices"] = rows
        if self.variant == BY_OPTION or (self.use_dora is True and self.variant == PLAIN):
            new |= {"variant": BY_OPTION, "use_dora": True}
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
        """Check variant, variant_options and use_dora, and that the variant goes with the other options."""
        if not isinstance(self.variant, str) or self.variant not in KNOWN_VARIANTS:
            known = listed(sorted(map(repr, KNOWN_VARIANTS)), len(KNOWN_VARIANTS))
            hint = near_misses(self.variant, KNOWN_VARIANTS) if isinstance(self.variant, str) else ""
            hint = hint if "did you mean" in hint else ""
            expected = f"one of {known} (import the file that defines another one first{hint})"
            _refuse("variant", expected, self.variant)
        self._check_variant_options(KNOWN_VARIANTS[self.variant].own_options)
        why_not = KNOWN_VARIANTS[self.variant].why_not_with(self) if self.variant != PLAIN else ""
        if why_not:
            raise LoRAError(f"LoRAConfig: {why_not}.")

    def _check_variant_options(self, defaults: Mapping[str, Any]) -> None:
        """Refuse unknown options of the variant and values of a wrong type, and drop values that are the default.

        Args:
            defaults: the variant's own options, at their defaults.
        """
        given = self.variant_options or {}
        refuse_unknown_option("LoRAConfig: variant_options: an option", given, defaults)
        for name, value in given.items():
            if not _is_like(value, defaults[name]):
                kind = "a finite number" if isinstance(defaults[name], float) else type(defaults[name]).__name__
                _refuse(f"variant_options[{name!r}]", kind, value)
        changed = {name: value for name, value in given.items() if value != defaults[name]}
        object.__setattr__(self, "variant_options", changed or None)

    def all_variant_options(self) -> dict[str, Any]:
        """Return all options that the variant alone has, with their values or defaults."""
        return {**KNOWN_VARIANTS[self.variant].own_options, **(self.variant_options or {})}


def scaling_of(r: int, alpha: float, *, rslora: bool) -> float:
    """Return s of a layer of rank r."""
    return alpha / (math.sqrt(r) if rslora else r)


def alpha_of(r: int, scaling: float, *, rslora: bool) -> float:
    """Return lora_alpha of a layer of rank r, without the rounding of a scaling that was computed from one."""
    alpha = float(f"{scaling * (math.sqrt(r) if rslora else r):.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def is_config(config: object) -> bool:
    """Return whether an object is a LoRAConfig or any config of peft; as_config refuses some of peft's."""
    return isinstance(config, LoRAConfig) or hasattr(config, "peft_type")


def as_config(config: LoRAConfig | PeftConfig) -> LoRAConfig:
    """Return a LoRAConfig unchanged; translate a peft.LoraConfig.

    Raises:
        LoRAError: it is a config of another class, or has an option that cannot be expressed.
    """
    return config if isinstance(config, LoRAConfig) else LoRAConfig.from_peft(config)


def is_start(init: object) -> bool:
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


def _is_like(value: object, default: object) -> bool:
    """Return whether a value has the type of a default; for a float any finite number is allowed."""
    return is_number(value) if isinstance(default, float) else type(value) is type(default)


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


def _values(config: LoRAConfig, option: str) -> list[tuple[str, Any]]:
    """Return an option's value by its name, or of "option[]" each value of the mapping; nothing of an optional one."""
    name = option.removesuffix("[]")
    value = getattr(config, name)
    if value is None and getattr(LoRAConfig, name) is None:  # its default
        return []
    return [(option, value)] if name == option else [(f"{name}[{key!r}]", each) for key, each in value.items()]


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
        "a list of names beside layers_to_transform, as in PEFT",
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
        lambda v, c: isinstance(v, bool) or v in get_args(Init) or is_start(v),
        "true, false, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_4' (or another number), 'olora', 'eva' or "
        "'lora_ga'",
    ),
    ("r", lambda v, c: c.init_lora_weights != "orthogonal" or v % 2 == 0, EVEN),
    ("rank_pattern[]", lambda v, c: c.init_lora_weights != "orthogonal" or v % 2 == 0, EVEN),
    ("use_dora", lambda v, c: not v or c.variant == BY_OPTION, "left out with variant={c.variant!r}"),
)
