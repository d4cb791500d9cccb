"""LoRAConfig: define and check the options of an adapter."""

from __future__ import annotations

import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, NoReturn, Protocol, cast, get_args

from .errors import LoRAError, sentence, shown
from .matching import ALL_LINEAR, layer_number, layer_pattern, matcher, near_misses, pattern_matches, suffix_pattern
from .names import KNOWN_VARIANTS, listed

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
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def tasks_with(heads: Iterable[str]) -> list[str]:
    """Return the values of task_type that add all of these names to modules_to_save."""
    return [task for task, added in TASK_HEADS.items() if set(heads) <= set(added)]


LISTS = {"modules_to_save": "a list of module names", "target_parameters": "a list of parameter names"}

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
        exclude_modules: layers to leave alone although target_modules names them.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        rank_pattern: another r for some layers, such as {"q_proj": 16}.
        alpha_pattern: another lora_alpha for some layers, with keys as in rank_pattern.
        bias: which biases are trained: "none", "all", or "lora_only", which is those of adapted layers.
        use_rslora: scale by s = lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
        use_dora: DoRA (arXiv:2402.09353): scale each output's weights W + s * B @ A to a trained magnitude.
        variant: what an adapter stores and adds to the weight: "lora", "dora", "loha" or one of your own.
        variant_options: options that a variant of your own has, by name.
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
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            _refuse("lora_dropout", "a probability in [0, 1)", self.lora_dropout)
        if self.target_modules is None or not (self.target_modules or self.target_parameters):
            _refuse(
                "target_modules",
                "at least one name, a regular expression, 'all-linear' or 'all-layers'",
                self.target_modules,
            )
        if self.target_parameters and self.lora_dropout:
            _refuse("lora_dropout", "0 with target_parameters, which have no input to drop", self.lora_dropout)
        for option in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            _check_names(option, getattr(self, option))
        self._check_layers()
        self._check_token_indices()
        for option, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            for pattern, value in (getattr(self, option) or {}).items():
                _check_regex(option, pattern, suffix_pattern)
                check(f"{option}[{pattern!r}]", value)
        if self.task_type is not None and self.task_type not in get_args(Task):
            _refuse("task_type", f"one of {', '.join(get_args(Task))}", self.task_type)
        if self.bias not in get_args(Bias):
            _refuse("bias", f"one of {', '.join(get_args(Bias))}", self.bias)
        for option in ("use_rslora", *VARIANTS, "autocast_adapter_dtype"):
            if not isinstance(getattr(self, option), bool):
                _refuse(option, "true or false", getattr(self, option))
        self._check_init()
        self._check_variant()
        _check_names("enable_lora", tuple(self.enable_lora or ()))
        for name, parts in (self.enable_lora or {}).items():
            if not isinstance(parts, tuple) or not all(isinstance(part, bool) for part in parts) or not any(parts):
                _refuse(f"enable_lora[{name!r}]", "a list of booleans with at least one true", parts)

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
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def enabled_parts(self, name: str) -> tuple[bool, ...] | None:
        """Return for each part of the fused projection `name` whether it is adapted; None for a layer without parts."""
        enabled = (self.enable_lora or {}).items()
        return next((tuple(parts) for entry, parts in enabled if f".{name}".endswith(f".{entry}")), None)

    @property
    def has_start(self) -> bool:
        """Whether the product of the initial A and B is subtracted, W' = W + s * (B @ A - B0 @ A0)."""
        return is_start(self.init_lora_weights) or self.init_lora_weights == FROM_GRADIENTS

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
        _refuse_unknown("an option", options, [field.name for field in fields(cls)])
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
        return [f"{name} was {getattr(self, name)!r}, now {getattr(now, name)!r}" for name in self.differing(now)]

    def _normalise(self) -> None:
        """Copy collections into immutable types, because the caller may change them; an empty one becomes None."""
        for option in ("r", "lora_alpha", "lora_dropout", "layers_to_transform"):
            object.__setattr__(self, option, plain_number(getattr(self, option)))
        for option in ("layers_to_transform", "layers_pattern"):
            value = getattr(self, option)
            if isinstance(value, (int, str)):
                object.__setattr__(self, option, (value,) if value != "" else None)
        for option in ("target_modules", *LISTS, "exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, option)
            if isinstance(value, (list, tuple, set, frozenset)):
                names = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
                names = tuple(map(plain_number, names))
                object.__setattr__(self, option, names if names or option == "target_modules" else None)
        indices = self.trainable_token_indices
        if isinstance(indices, Mapping):
            rows: Any = {name: _ascending(numbers) for name, numbers in indices.items()}
            object.__setattr__(self, "trainable_token_indices", rows or None)
        elif indices is not None:
            object.__setattr__(self, "trainable_token_indices", _ascending(indices) or None)
        if self.variant == BY_OPTION or (self.use_dora is True and self.variant == PLAIN):
            object.__setattr__(self, "variant", BY_OPTION)
            object.__setattr__(self, "use_dora", True)
        if isinstance(self.task_type, Enum):  # peft.TaskType
            object.__setattr__(self, "task_type", self.task_type.value)
        for option in ("rank_pattern", "alpha_pattern", "enable_lora", "variant_options"):
            value = getattr(self, option)
            if value is None:
                continue
            if not isinstance(value, Mapping):
                _refuse(option, "a mapping", value)
            if option == "enable_lora":
                value = {name: tuple(parts) if isinstance(parts, list) else parts for name, parts in value.items()}
            else:
                value = {pattern: plain_number(number) for pattern, number in value.items()}
            object.__setattr__(self, option, dict(value) or None)

    def _check_token_indices(self) -> None:
        """Check trainable_token_indices."""
        indices = self.trainable_token_indices
        if indices is None:
            return
        if isinstance(indices, Mapping):
            _check_names("trainable_token_indices", tuple(indices))
        for rows in indices.values() if isinstance(indices, Mapping) else [indices]:
            if not isinstance(rows, tuple) or not rows or not all(map(_is_index, rows)):
                _refuse("trainable_token_indices", "a list of whole numbers from 0, or one for each table", indices)
            if len(set(rows)) < len(rows):
                _refuse("trainable_token_indices", "without a number twice", indices)

    def _check_layers(self) -> None:
        """Check layers_to_transform and layers_pattern, by themselves and together with target_modules."""
        numbers, patterns = self.layers_to_transform, self.layers_pattern
        if numbers is not None and (not isinstance(numbers, tuple) or not all(map(_is_index, numbers))):
            _refuse("layers_to_transform", "a whole number from 0 or a list of them", numbers)
        if patterns is not None and (not isinstance(patterns, tuple) or not all(patterns)):
            _refuse("layers_pattern", "a name, a regular expression or a list of them", patterns)
        for pattern in patterns or ():
            _check_regex("layers_pattern", pattern, layer_pattern)
        if patterns is not None and numbers is None:
            _refuse("layers_pattern", "left out, for there is no layers_to_transform", patterns)
        if numbers is not None and isinstance(self.target_modules, str):
            _refuse("target_modules", "a list of names beside layers_to_transform, as in PEFT", self.target_modules)

    def _check_variant(self) -> None:
        """Check variant, variant_options and use_dora, and that the variant goes with the other options."""
        if not isinstance(self.variant, str) or self.variant not in KNOWN_VARIANTS:
            known = listed(sorted(map(repr, KNOWN_VARIANTS)), len(KNOWN_VARIANTS))
            hint = near_misses(self.variant, KNOWN_VARIANTS) if isinstance(self.variant, str) else ""
            hint = hint if "did you mean" in hint else ""
            expected = f"one of {known} (import the file that defines another one first{hint})"
            _refuse("variant", expected, self.variant)
        if self.use_dora and self.variant != BY_OPTION:
            _refuse("use_dora", f"left out with variant={self.variant!r}", self.use_dora)
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
        _refuse_unknown("variant_options: an option", given, defaults)
        for name, value in given.items():
            if not _is_like(value, defaults[name]):
                kind = "a finite number" if isinstance(defaults[name], float) else type(defaults[name]).__name__
                _refuse(f"variant_options[{name!r}]", kind, value)
        changed = {name: value for name, value in given.items() if value != defaults[name]}
        object.__setattr__(self, "variant_options", changed or None)

    def all_variant_options(self) -> dict[str, Any]:
        """Return all options that the variant alone has, with their values or defaults."""
        return {**KNOWN_VARIANTS[self.variant].own_options, **(self.variant_options or {})}

    def _check_init(self) -> None:
        """Check init_lora_weights, and that each r goes with it."""
        init = self.init_lora_weights
        if not isinstance(init, bool) and init not in get_args(Init) and not is_start(init):
            weight = "'pissa', 'pissa_niter_4' (or another number), 'olora'"
            expected = f"true, false, 'gaussian', 'orthogonal', {weight}, 'eva' or 'lora_ga'"
            _refuse("init_lora_weights", expected, init)
        for rank in (self.r, *(self.rank_pattern or {}).values()) if init == "orthogonal" else ():
            if rank % 2:
                _refuse("r", "an even rank for init_lora_weights='orthogonal'", rank)


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


def _ascending(rows: Any) -> Any:
    """Return whole numbers of a collection in ascending order, as a tuple; other values unchanged."""
    if not isinstance(rows, (list, tuple, set, frozenset)):
        return rows
    rows = tuple(map(plain_number, rows))
    return tuple(sorted(rows)) if all(map(_is_index, rows)) else rows


def _plain(value: Any) -> Any:
    """Return tuples as lists, also inside mappings and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _refuse_unknown(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    unknown = [name for name in map(str, given) if name not in known]
    if unknown:
        raise LoRAError(f"LoRAConfig: {what} is unknown: {unknown[0]!r}; there are {', '.join(known)}.")


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


def _check_rank(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _refuse(option, "a whole number of at least 1", value)


def _check_alpha(option: str, value: object) -> None:
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        _refuse(option, "a finite number above 0", value)


def _check_regex(option: str, pattern: object, whole: Callable[[str], str] = str) -> None:
    """Refuse a pattern that is no regular expression, by itself or as part of the expression that `whole` builds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # Python 3.10 warns where 3.11 refuses
            re.compile(pattern)  # type: ignore[call-overload]
            re.compile(whole(pattern))  # type: ignore[arg-type]
    except (re.error, TypeError, OverflowError, RecursionError, DeprecationWarning) as error:
        raise LoRAError(f"LoRAConfig: {option}: {shown(pattern)} is not a regular expression: {error}.") from error


def _check_names(option: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, str) and option not in LISTS:
        _check_regex(option, value)
    elif not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        kind = LISTS.get(option, "a list of names or a regular expression")
        _refuse(option, kind, value)
