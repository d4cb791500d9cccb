"""summary: describe what is adapted, trained and saved in a model, and the memory that training will take."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
from ..names import cut_at_left, group_of, listed
from ..nn.adapted_module import Swapped
from ..nn.adapted_weights import AdaptedWeights
from ..nn.quantized import quantized_as, quantized_parameters, shape_of
from ..nn.variant import variant_of
from ..units import size_text

WIDTH = 80  # columns of the plain text
LABEL, CLASS = 14, 20  # columns of a fact's label, and of a class at most
LINES, MOST_ROWS = 10, 4  # of the short form, and of its table
ON_REQUEST = ("also saved", "checkpoints", "memory")  # facts that the short form leaves out
SAVED = {"adapter": "the adapter", "merged": "merged weights, and the adapter", "full": "base and adapter"}
HEAD = ("layers", "class", "count", "r", "alpha", "s", "parameters")
SMALL = 0.5  # an s below is small: an adapter with it hardly acts, and learns as with a smaller rate


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
    """Layers that are left out for one reason: not adapted, but for those that are fully trained, or not merged."""

    names: tuple[str, ...]
    reason: str
    share: float = 0.0  # of the parameters


@dataclass(frozen=True)
class Summary:
    """A description of an injected model. `str` gives all of it, as text of 80 columns; `short` what is most needed."""

    title: str  # the variant, the number of layers and the start
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
    left_out: tuple[LeftOut, ...]  # by "all-linear" or "all-layers"
    by_kind: str  # "all-linear" or "all-layers", if that is target_modules, else ""
    experts: str  # the option that adapts stacks of experts which `by_kind` does not adapt, to copy; "" for none
    frozen_head: str  # which head is frozen, and how to train it if it is new; "" where none is known to be
    quantized: Mapping[str, int]  # the number of the base's quantized weights, by kind of quantization
    unmerged: tuple[LeftOut, ...]  # adapted layers that stay factored when the model is merged
    attached: Mapping[str, float]  # the strengths of the frozen adapters that are attached, by name
    merged_eval: bool | None  # LoRACallback's option; None without a callback
    save: str | None  # LoRACallback's option; None without a callback
    memory: Memory

    def __str__(self) -> str:
        facts = [line for label, text in self._facts().items() for line in _wrapped(label, text)]
        return "\n".join([self.title, *self._table(len(self.groups)), *facts])

    def short(self) -> str:
        """Return at most ten lines of at most 80 columns, as LoRACallback shows them at fit start."""
        facts: list[str] = []
        for label, text in self._facts().items():
            if label == "head":  # never cut: it has an option to copy
                facts += _wrapped(label, text)
            elif label not in ON_REQUEST and (label, text) != ("evaluation", "merged"):
                facts.append(f"  {label:{LABEL}}{textwrap.shorten(text, WIDTH - LABEL - 2, placeholder=' ...')}")
        rows = max(1, min(MOST_ROWS, LINES - 2 - len(facts)))
        return "\n".join([self.title, *self._table(rows), *facts])

    def _table(self, most: int) -> list[str]:
        """Return a line of heads and at most so many lines of groups, of which the last one may count the rest."""
        if not self.groups:
            return []
        shown = len(self.groups) if len(self.groups) <= most else most - 1
        rows = [HEAD]
        for group in self.groups[:shown]:
            strength = (str(group.r), f"{group.alpha:g}", f"{group.scaling:.3g}") if group.r else ("", "", "")
            rows.append((group.name, group.kind, str(group.count), *strength, f"{group.parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[1] = min(widths[1], CLASS)
        widths[0] = min(widths[0], WIDTH - 2 * len(HEAD) - sum(widths[1:]))  # what the others leave
        lines = []
        for name, kind, *numbers in rows:
            right = [cell.rjust(width) for cell, width in zip(numbers, widths[2:], strict=True)]
            left = [cut_at_left(name, widths[0]).ljust(widths[0]), kind[: widths[1]].ljust(widths[1])]
            lines.append(f"  {'  '.join(left + right)}")
        if rest := self.groups[shown:]:
            layers = _counted(sum(group.count for group in rest), "layer")
            lines.append(f"  and {_counted(len(rest), 'more group')} of layers ({layers})")
        return lines

    def _facts(self) -> dict[str, str]:
        """Return the facts below the table, by label."""
        not_adapted = []
        for each in self.left_out:
            share = f"{each.share:.1%} of all, " if each.share else ""
            not_adapted.append(f"leaves out {listed(each.names)} ({share}{each.reason})")
        saved = SAVED[self.save or "adapter"]
        if not self.layers:
            saved = saved.replace("the adapter", "what is trained").replace("adapter", "it")
        memory = self.memory
        facts = {
            "trainable": f"{self.trainable:,} of {self.total:,} parameters ({self.trainable / max(self.total, 1):.2%})",
            "scaling": self.small_scaling,
            "adapter": f"{size_text(self.adapter_bytes)} in {' and '.join(self.adapter_dtypes)}" if self.layers else "",
            "attached": ", ".join(f"{name} (strength {strength:g})" for name, strength in self.attached.items()),
            "also trained": _sizes(self.also_trained),
            "also saved": _sizes(self.also_saved),
            self.by_kind or "left out": "; ".join(not_adapted),
            "experts": f"{self.experts} adapts them" if self.experts else "",
            "head": self.frozen_head,
            "quantized": ", ".join(f"{_counted(count, 'weight')} as {kind}" for kind, count in self.quantized.items()),
            "merging" if self.merged_eval is None else "evaluation": self._evaluation(),
            "checkpoints": f'{saved} (save="{self.save}")' if self.save else "",
            "memory": (
                f"{size_text(memory.total)} and activations: weights {size_text(memory.weights)}, "
                f"adapter {size_text(memory.adapter)}, gradients {size_text(memory.gradients)}, "
                f"optimizer {size_text(memory.optimizer)} (two states, as AdamW's)"
            ),
        }
        return {label: text for label, text in facts.items() if text}

    def _evaluation(self) -> str:
        """Return whether evaluations run merged, and which layers cannot."""
        if not self.layers:
            return ""
        if self.merged_eval is False:
            return "factored (merged_eval=False)"
        count = sum(len(each.names) for each in self.unmerged)
        which = "; ".join(f"{listed(each.names)}: {each.reason}" for each in self.unmerged)
        if count == self.layers:
            return f"factored, as no layer can be merged ({which})"
        if count:
            return f"merged, but for {_counted(count, 'layer')} ({which})"
        return "merged" if self.merged_eval else ""


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
    factors = _each_once(layer.trained_tensors() for layer in layers.values())
    stored = _each_once(layer.stored().values() for layer in layers.values())
    base = {each.name: each.parameter for each in base_parameters_of(handle.modules)}
    trainable = [parameter for parameter in (*factors, *base.values()) if parameter.requires_grad]
    total = sum(shape_of(parameter).numel() for parameter in (*factors, *base.values()))
    also_trained = {name: shape_of(parameter).numel() for name, parameter in base.items() if parameter.requires_grad}
    saved = {name: shape_of(value).numel() for name, value in handle.initial().items()}
    groups = _group(layers)
    own = (buffer for _, module in handle.modules for buffer in module._buffers.values() if buffer is not None)
    buffers = {id(buffer): buffer for buffer in own}.values()
    quantized = _each_once(quantized_parameters(module).values() for _, module in handle.modules)
    return Summary(
        title=_title(injection, len(layers)),
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
        quantized=dict(Counter(map(quantized_as, quantized))),
        unmerged=_unmerged(layers),
        attached={name: each.strength for name, each in sorted(injection.attached.items())},
        merged_eval=getattr(injection.run, "merged_eval", None),  # a Run of trainer/, which this folder does not import
        save=getattr(injection.run, "save", None),
        memory=Memory(
            weights=_local_bytes((*base.values(), *buffers)),
            adapter=_local_bytes(stored),
            gradients=_local_bytes(trainable),
            optimizer=2 * _local_bytes(trainable),
        ),
    )


def _each_once(parameters: Iterable[Iterable[nn.Parameter]]) -> list[nn.Parameter]:
    """Return parameters that layers may share, each once."""
    return list({id(parameter): parameter for of_layer in parameters for parameter in of_layer}.values())


def _title(injection: Injection, layers: int) -> str:
    if not injection.has_trained_adapter:
        return "No trained adapter: what is attached acts alone"
    if not layers:
        return "No adapter (target_modules=[]): the base is frozen but for what is also trained"
    init = injection.config.init_lora_weights
    start = {True: "", False: "random"}[init] if isinstance(init, bool) else init
    variant = variant_of(injection.config).title + (" with use_rslora" if injection.config.use_rslora else "")
    return f"{variant}: {_counted(layers, 'adapted layer')}" + (f", start: {start}" if start else "")


def _unmerged(layers: Mapping[str, AdaptedWeights]) -> tuple[LeftOut, ...]:
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer.why_not_merge(), []).append(name)
    return tuple(LeftOut(tuple(of_reason), reason) for reason, of_reason in names.items() if reason)


def _group(layers: Mapping[str, AdaptedWeights]) -> tuple[LayerGroup, ...]:
    sizes: dict[tuple[str, str, int, float, float], list[int]] = {}
    for name, layer in layers.items():
        spec, holder = layer.lora.spec, layer.lora_holder
        kind = holder.lora_base.__name__ if isinstance(holder, Swapped) else type(holder).__name__
        key = (group_of(name), kind, spec.r, spec.alpha, spec.scaling)
        if spec.rows:
            key = (group_of(name), f"{kind}, {_counted(len(spec.rows), 'row')}", 0, 0.0, 0.0)
        sizes.setdefault(key, []).append(sum(shape_of(factor).numel() for factor in layer.trained_tensors()))
    return tuple(
        LayerGroup(name, kind, len(of_group), r, alpha, scaling, sum(of_group))
        for (name, kind, r, alpha, scaling), of_group in sizes.items()
    )


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


def _wrapped(label: str, text: str) -> list[str]:
    """Return a fact in as many lines of WIDTH columns as it takes."""
    lead = f"  {label:{LABEL}}"
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False)
