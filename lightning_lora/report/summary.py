"""summary: describe what is adapted, trained and saved in a model, and the memory that training will take."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.sharding import local
from ..matching import BY_KIND
from ..model.adapted_model import AdaptedModel, open_model
from ..model.experts import option_for_experts
from ..model.heads import describe_frozen_head
from ..model.injection import Injection
from ..model.named_state import base_parameters_of
from ..names import group_of, listed
from ..nn.adapted_module import Swapped
from ..nn.adapted_weights import AdaptedWeights
from ..nn.quantized import quantized_as, quantized_parameters, shape_of
from ..nn.variant import variant_of
from ..units import size_text

WIDTH = 80  # columns of the plain text
NARROWEST = 12  # columns for a long name or class at least
LINES, MOST_ROWS = 10, 4  # of the short form, and of its table
ON_REQUEST = ("also saved", "checkpoints", "memory")  # facts that the short form leaves out
QUANTIZED = "its weight is quantized"  # the beginning of a reason
SAVED = {"adapter": "the adapter", "merged": "merged weights, and the adapter", "full": "base and adapter"}
HEAD = ("layers", "class", "count", "r", "alpha", "s", "parameters")
SMALL = 0.5  # an s below is small: an adapter with it hardly acts, and learns as with a smaller rate
BESIDE_NUMBER, GLUE = re.compile(r"(?<=\w) (?=\d)|(?<=\d) (?=\w)"), "\xa0"  # a line breaks at no such blank
OF_SEVERAL = {
    "its weight is ": "their weights are ",
    "its weight has ": "their weights have ",
    "it is the output head": "they are output heads",
}


@dataclass(frozen=True)
class LayerGroup:
    """Adapted layers with the same ending of the name, class, r and lora_alpha."""

    name: str  # the ending of their names, see names.group_of
    kind: str  # their class before injection
    count: int
    r: int  # 0 for a table with trained rows
    alpha: float  # 0 for a table with trained rows
    scaling: float  # s; 0 for a table with trained rows
    parameters: int  # of A and B, in all layers of the group


@dataclass(frozen=True)
class Memory:
    """Bytes on this device without activations. Of a sharded tensor this rank's shard counts."""

    weights: int  # of the base, buffers included
    adapter: int
    gradients: int  # of trainable parameters, in their dtypes
    optimizer: int  # AdamW's two states of trainable parameters, in their dtypes

    @property
    def total(self) -> int:
        """The sum of all four."""
        return self.weights + self.adapter + self.gradients + self.optimizer


@dataclass(frozen=True)
class LeftOut:
    """Layers that "all-linear" or "all-layers" leaves out for one reason, but for layers that are trained whole."""

    names: tuple[str, ...]
    reason: str
    share: float  # of the parameters


@dataclass(frozen=True)
class Unmerged:
    """Adapted layers that stay factored for one reason when the model is merged."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Summary:
    """A description of an injected model. `str` gives all of it, as text of 80 columns; `short` what is most needed."""

    variant: str  # the variant's title, and "with use_rslora"
    start: str  # the value of init_lora_weights; "" for True
    layers: int  # the number of adapted layers and single parameters
    groups: tuple[LayerGroup, ...]  # of the adapted layers, in the model's order
    trainable: int  # the number of trainable parameters, A and B included
    total: int  # the number of parameters, A and B included, but not the A0 and B0 of a start that is subtracted
    small_scaling: str  # the s of groups in which it is small because lora_alpha is the default; "" where none is
    adapter_parameters: int  # the number of parameters of A and B
    adapter_bytes: int  # of A, B, A0 and B0, on all ranks together
    adapter_dtypes: tuple[str, ...]
    also_trained: Mapping[str, int]  # sizes of trainable parameters beside A and B, by name
    also_saved: Mapping[str, int]  # sizes of tensors that are saved with the adapter but not trained now, by name
    left_out: tuple[LeftOut, ...]
    by_kind: str  # "all-linear" or "all-layers", if that is target_modules, else ""
    experts: str  # the option that adapts stacks of experts which `by_kind` does not adapt, to copy; "" for none
    frozen_head: str  # which head is frozen, and how to train it if it is new; "" where none is known to be
    quantized: Mapping[str, int]  # the number of the base's quantized weights, by kind of quantization
    unmerged: tuple[Unmerged, ...]
    attached: Mapping[str, float]  # the strengths of the frozen adapters that are attached, by name
    merged_eval: bool | None  # LoRACallback's option; None without a callback
    save: str | None  # LoRACallback's option; None without a callback
    memory: Memory

    def __str__(self) -> str:
        return self._text(self._table(len(self.groups)), self._facts(), _wrapped)

    def short(self) -> str:
        """Return at most ten lines of at most 80 columns, as LoRACallback shows them at fit start."""
        facts = [(label, text) for label, text in self._facts(short=True) if label not in ON_REQUEST]
        rows = min(MOST_ROWS, LINES - 2 - len(self._lines(facts, _cut)))
        return self._text(self._table(rows), facts, _cut)

    def _text(self, table: list[str], facts: list[tuple[str, str]], fit: Callable[[str, str], list[str]]) -> str:
        return "\n".join([*fit("", self._title()), *table, *self._lines(facts, fit)])

    def _lines(self, facts: list[tuple[str, str]], fit: Callable[[str, str], list[str]]) -> list[str]:
        width = max(len(label) for label, _ in facts) + 2
        return [
            # A line that is cut would lose the option to copy, or that the head is frozen.
            line
            for label, text in facts
            for line in (_wrapped if label == "head" else fit)(f"  {label.ljust(width)}", text)
        ]

    def _title(self) -> str:
        if not self.variant:
            return "No trained adapter: what is attached acts alone"
        if not self.layers:
            return "No adapter (target_modules=[]): the base is frozen but for what is also trained"
        start = f", start: {self.start}" if self.start else ""
        return f"{self.variant}: {_counted(self.layers, 'adapted layer')}{start}"

    def _table(self, most: int) -> list[str]:
        """Return a line of heads and at most so many lines of groups, of which the last one may count the rest."""
        shown = len(self.groups) if len(self.groups) <= most else most - 1
        rows = [
            (group.name, group.kind, str(group.count), *_rank_and_scaling(group), f"{group.parameters:,}")
            for group in self.groups[:shown]
        ]
        rest = self.groups[shown:]
        if not self.groups:
            return []
        layers = _counted(sum(group.count for group in rest), "layer")
        return [
            *_lines_of(rows),
            *([f"  and {_counted(len(rest), 'more group')} of layers ({layers})"] if rest else []),
        ]

    def _facts(self, *, short: bool = False) -> list[tuple[str, str]]:
        share = f"{self.trainable / max(self.total, 1):.2%}"
        memory = self.memory
        quantized = ", ".join(f"{_counted(count, 'weight')} as {kind}" for kind, count in self.quantized.items())
        evaluation = self._evaluation(short=short)
        if short and quantized:  # both in one line
            stays = self.merged_eval is not False and any(each.reason.startswith(QUANTIZED) for each in self.unmerged)
            said = ["adapted ones stay factored"] if stays else []
            said += [f"evaluation {evaluation}"] if evaluation else []
            quantized, evaluation = "; ".join([quantized, *said]), ""
        facts = {
            "trainable": f"{self.trainable:,} of {self.total:,} parameters ({share})",
            "scaling": self.small_scaling,
            "adapter": f"{size_text(self.adapter_bytes)} in {' and '.join(self.adapter_dtypes)}" if self.layers else "",
            "attached": ", ".join(f"{name} (strength {strength:g})" for name, strength in self.attached.items()),
            "also trained": _sizes(self.also_trained),
            "also saved": _sizes(self.also_saved),
            self.by_kind or "left out": "; ".join(map(_left_out_text, self.left_out)),
            "experts": f"{self.experts} adapts them" if self.experts else "",
            "head": self.frozen_head,
            "quantized": quantized,
            "merging" if self.merged_eval is None else "evaluation": evaluation,
            "checkpoints": f'{self._saved()} (save="{self.save}")' if self.save else "",
            "memory": (
                f"{size_text(memory.total)} and activations: weights {size_text(memory.weights)}, "
                f"adapter {size_text(memory.adapter)}, gradients {size_text(memory.gradients)}, "
                f"optimizer {size_text(memory.optimizer)} (two states, as AdamW's)"
            ),
        }
        return [(label, text) for label, text in facts.items() if text]

    def _saved(self) -> str:
        saved = SAVED[self.save or "adapter"]
        return saved if self.layers else saved.replace("the adapter", "what is trained").replace("adapter", "it")

    def _evaluation(self, *, short: bool) -> str:
        """Say whether evaluations run merged, and which layers cannot. Short: only what is not the default."""
        if not self.layers:
            return ""
        if self.merged_eval is False:
            return "factored (merged_eval=False)"
        unmerged = [each for each in self.unmerged if not (short and each.reason.startswith(QUANTIZED))]
        count = sum(len(each.names) for each in unmerged)
        which = "; ".join(f"{listed(each.names)}: {_reason_text(each)}" for each in unmerged)
        if count == self.layers:
            return f"factored, as no layer can be merged ({which})"
        if count:
            return f"merged, but for {_counted(count, 'layer')} ({which})"
        return "merged" if self.merged_eval and not short else ""


def summary(model: nn.Module) -> Summary:
    """Describe what is adapted in a model, as an object that prints itself. The model is not changed.

    Args:
        model: any module that holds all adapted layers.

    Returns:
        The description, of plain types. `merged_eval` and `save` are those of the callback that trained the model last.

    Raises:
        LoRAError: the model was not injected.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> names = inject(model, LoRAConfig(r=2))
        >>> report = summary(model)
        >>> report.trainable, report.total
        (52, 142)
    """
    return summarise(open_model(model, "summary", attached=True))


def summarise(handle: AdaptedModel) -> Summary:
    """Do what summary does, for an opened model."""
    injection, layers = handle.injection, handle.layers
    factors = _each_once(layer.factors() for layer in layers.values())
    stored = _each_once(layer.stored().values() for layer in layers.values())
    base = {each.name: each.parameter for each in base_parameters_of(handle.modules)}
    trainable = [parameter for parameter in (*factors, *base.values()) if parameter.requires_grad]
    total = sum(shape_of(parameter).numel() for parameter in (*factors, *base.values()))
    also_trained = {name: shape_of(parameter).numel() for name, parameter in base.items() if parameter.requires_grad}
    saved = {name: shape_of(value).numel() for name, value in handle.initial().items()}
    variant = variant_of(injection.config).title + (" with use_rslora" if injection.config.use_rslora else "")
    groups = _group(layers)
    return Summary(
        variant=variant if injection.is_injection else "",
        start=_start(injection.config.init_lora_weights),
        layers=len(layers),
        groups=groups,
        trainable=sum(shape_of(parameter).numel() for parameter in trainable),
        total=total,
        small_scaling=_small_scaling(injection, groups),
        adapter_parameters=sum(shape_of(factor).numel() for factor in factors),
        adapter_bytes=sum(shape_of(factor).numel() * factor.itemsize for factor in stored),
        adapter_dtypes=tuple(dict.fromkeys(str(factor.dtype).removeprefix("torch.") for factor in factors)),
        also_trained=also_trained,
        also_saved={name: size for name, size in saved.items() if name not in also_trained},
        left_out=_left_out(handle.left_out(), base, total - sum(shape_of(factor).numel() for factor in factors)),
        by_kind=next((value for value in BY_KIND if value == injection.config.target_modules), ""),
        experts=option_for_experts(handle),
        frozen_head=describe_frozen_head(handle.root_modules),
        quantized=_quantized(handle),
        unmerged=_unmerged(layers),
        attached={name: each.strength for name, each in sorted(injection.attached.items())},
        merged_eval=getattr(injection.run, "merged_eval", None),  # a Run of trainer/, which this folder does not import
        save=getattr(injection.run, "save", None),
        memory=Memory(
            weights=_local_bytes((*base.values(), *_buffers(handle))),
            adapter=_local_bytes(stored),
            gradients=_local_bytes(trainable),
            optimizer=2 * _local_bytes(trainable),
        ),
    )


def _each_once(parameters: Iterable[Iterable[nn.Parameter]]) -> list[nn.Parameter]:
    """Return parameters that layers may share, each once."""
    return list({id(parameter): parameter for of_layer in parameters for parameter in of_layer}.values())


def _start(init: bool | str) -> str:
    return {True: "", False: "random"}[init] if isinstance(init, bool) else init


def _buffers(handle: AdaptedModel) -> list[torch.Tensor]:
    own = (buffer for _, module in handle.modules for buffer in module._buffers.values() if buffer is not None)
    return list({id(buffer): buffer for buffer in own}.values())


def _quantized(handle: AdaptedModel) -> dict[str, int]:
    weights = _each_once(quantized_parameters(module).values() for _, module in handle.modules)
    return dict(Counter(map(quantized_as, weights)))


def _unmerged(layers: Mapping[str, AdaptedWeights]) -> tuple[Unmerged, ...]:
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer.why_not_merge(), []).append(name)
    return tuple(Unmerged(tuple(of_reason), reason) for reason, of_reason in names.items() if reason)


def _group(layers: Mapping[str, AdaptedWeights]) -> tuple[LayerGroup, ...]:
    sizes: dict[tuple[str, str, int, float, float], list[int]] = {}
    for name, layer in layers.items():
        spec, holder = layer.lora.spec, layer.lora_holder
        kind = holder.lora_base.__name__ if isinstance(holder, Swapped) else type(holder).__name__
        key = (group_of(name), kind, spec.r, spec.alpha, spec.scaling)
        if spec.rows:
            key = (group_of(name), f"{kind}, {_counted(len(spec.rows), 'row')}", 0, 0.0, 0.0)
        sizes.setdefault(key, []).append(sum(shape_of(factor).numel() for factor in layer.factors()))
    return tuple(
        LayerGroup(name, kind, len(of_group), r, alpha, scaling, sum(of_group))
        for (name, kind, r, alpha, scaling), of_group in sizes.items()
    )


def _rank_and_scaling(group: LayerGroup) -> tuple[str, str, str]:
    return (str(group.r), f"{group.alpha:g}", f"{group.scaling:.3g}") if group.r else ("", "", "")


def _small_scaling(injection: Injection, groups: Iterable[LayerGroup]) -> str:
    """Say where s is small because lora_alpha is the default, which goes with r = 8. A loaded adapter's is its own."""
    default = LoRAConfig().lora_alpha
    if injection.chosen is not None or injection.config.lora_alpha != default:
        return ""
    small = sorted({group.scaling for group in groups if group.alpha == default and 0 < group.scaling < SMALL})
    shown = " and ".join(dict.fromkeys(f"{each:.3g}" for each in (small[:1] + small[-1:])))
    return f"s = {shown}: lora_alpha is {default:g}, its default; 32 is usual" if small else ""


def _left_out(reasons: Mapping[str, str], base: Mapping[str, nn.Parameter], total: int) -> tuple[LeftOut, ...]:
    names: dict[str, list[str]] = {}
    frozen = {name.rpartition(".")[0] for name, parameter in base.items() if not parameter.requires_grad}
    trained = {name.rpartition(".")[0] for name in base} - frozen
    for name, reason in reasons.items():
        if name not in trained:
            names.setdefault(reason, []).append(name)
    sizes: dict[str, int] = {}  # by module; a shared weight is under its first name alone
    for name, parameter in base.items():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + shape_of(parameter).numel()
    return tuple(
        LeftOut(tuple(of_reason), reason, sum(sizes.get(name, 0) for name in of_reason) / max(total, 1))
        for reason, of_reason in names.items()
    )


def _local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes that these tensors take on this rank."""
    return sum(tensor.nbytes for whole in tensors for tensor in _parts(local(whole)))


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor subclass consists of, such as a quantized tensor; else the tensor."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for part in (getattr(tensor, name) for name in flatten()[0]):
        if isinstance(part, torch.Tensor):
            yield from _parts(part)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _sizes(sizes: Mapping[str, int]) -> str:
    """Return text with the number of tensors, the number of their values and the first names."""
    if not sizes:
        return ""
    return f"{_counted(len(sizes), 'tensor')}, {_counted(sum(sizes.values()), 'value')}: {listed(list(sizes))}"


def _left_out_text(left_out: LeftOut) -> str:
    share = f"{left_out.share:.1%} of all, " if left_out.share else ""
    return f"leaves out {listed(left_out.names)} ({share}{_reason_text(left_out)})"


def _reason_text(about: LeftOut | Unmerged) -> str:
    """Return why, in words that fit the number of layers."""
    reason = about.reason
    if len(about.names) > 1:
        for one, several in OF_SEVERAL.items():
            reason = reason.replace(one, several)
    return reason


def _lines_of(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table of groups. Long classes are cut at their end, and long names at their beginning."""
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    for column in (1, 0):
        excess = sum(widths) + 2 * len(widths) - WIDTH
        widths[column] = max(min(widths[column], NARROWEST), widths[column] - max(excess, 0))
    lines = []
    for name, kind, *numbers in (HEAD, *rows):
        name = name if len(name) <= widths[0] else f"...{name[3 - widths[0] :]}"
        kind = kind if len(kind) <= widths[1] else f"{kind[: widths[1] - 3]}..."
        right = [cell.rjust(width) for cell, width in zip(numbers, widths[2:], strict=True)]
        lines.append(f"  {'  '.join([name.ljust(widths[0]), kind.ljust(widths[1]), *right])}")
    return lines


def _wrapped(lead: str, text: str) -> list[str]:
    """Return a text after its lead, in as many lines of WIDTH columns as it takes."""
    glued, indent = BESIDE_NUMBER.sub(GLUE, text), " " * len(lead)
    lines = textwrap.wrap(glued, WIDTH, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace(GLUE, " ") for line in lines]


def _cut(lead: str, text: str) -> list[str]:
    """Return a text after its lead in one line of WIDTH columns, with fewer names where it is too long."""
    room = WIDTH - len(lead)
    if len(text) > room:
        begin = text[: room - len(" ...")]
        end = max(begin.rfind(mark) for mark in (", ", "; ", ": ", " (")) + 1
        text = f"{begin[:end].rstrip()} ..." if end else f"{begin}..."
    return [lead + text]
