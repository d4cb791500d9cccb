"""Formulas for what LoRA under FSDP2 costs each rank. test_scale.py compares each with a small measurement.

`python tests/support/ranks/scale.py` prints the README's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

Shape = tuple[int, int]
NANOSECONDS = 4.0  # a bfloat16 weight on one core, of 4096 x 4096, r = 16
RANKS = (8, 64, 512)


@dataclass(frozen=True)
class Llama:
    """A Llama's sizes; every linear layer of its blocks is adapted."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    keys: int
    vocabulary: int

    def linear(self) -> list[Shape]:
        """(out, in) of the linear layers of one block."""
        square, narrow = (self.hidden, self.hidden), (self.keys, self.hidden)
        wide = (self.intermediate, self.hidden)
        return [square, narrow, narrow, square, wide, wide, (self.hidden, self.intermediate)]

    def factors(self, r: int) -> list[Shape]:
        """Shapes of A and B in one block."""
        return [shape for out, into in self.linear() for shape in ((r, into), (out, r))]

    def rest(self) -> list[Shape]:
        """What is in no block: embedding, head, last norm."""
        return [(self.vocabulary, self.hidden), (self.vocabulary, self.hidden), (self.hidden, 1)]

    def block(self) -> list[Shape]:
        """Base parameters of one block."""
        return [*self.linear(), (self.hidden, 1), (self.hidden, 1)]

    def parameters(self) -> int:
        """Of the base."""
        return self.blocks * size(self.block()) + size(self.rest())


MODELS = [
    Llama("8B", 32, 4096, 14336, 1024, 128256),
    Llama("70B", 80, 8192, 28672, 1024, 128256),
    Llama("405B", 126, 16384, 53248, 1024, 128256),
]


def size(shapes: list[Shape]) -> int:
    """Elements of whole tensors."""
    return sum(rows * cols for rows, cols in shapes)


def shard(shapes: list[Shape], ranks: int) -> int:
    """Elements of each rank under FSDP2, which splits rows and rounds up."""
    return sum(ceil(rows / ranks) * cols for rows, cols in shapes)


def by_columns(shapes: list[Shape], ranks: int) -> list[Shape]:
    """Elements of each rank with short tensors split by columns (shard_placement_fn), without rounding up."""
    return [(cols, rows) if rows < ranks <= cols and cols % ranks == 0 else (rows, cols) for rows, cols in shapes]


@dataclass(frozen=True)
class Costs:
    """Bytes of each rank: a base of `wide` bytes an element, adapters and their AdamW state in float32.

    Attributes:
        columns: A is split by columns where it has fewer rows than there are ranks.
        kept_share: values kept while merged, as a share of the weights' bytes (README: what it costs).
    """

    model: Llama
    ranks: int
    r: int = 16
    wide: int = 2
    columns: bool = False
    kept_share: float = 0.05

    def factors(self) -> list[Shape]:
        """Of one block, as they are split."""
        shapes = self.model.factors(self.r)
        return by_columns(shapes, self.ranks) if self.columns else shapes

    def base_shard(self) -> int:
        """The base's part on each rank."""
        model = self.model
        return self.wide * (model.blocks * shard(model.block(), self.ranks) + shard(model.rest(), self.ranks))

    def adapter_shard(self) -> int:
        """Weights, gradients and two moments of AdamW."""
        return 4 * 4 * self.model.blocks * shard(self.factors(), self.ranks)

    def gathered_block(self) -> int:
        """One block gathered, as long as it computes; prefetching holds two."""
        return self.ranks * (self.wide * shard(self.model.block(), self.ranks) + 4 * shard(self.factors(), self.ranks))

    def received_in_step(self) -> int:
        """All-gathers (blocks in forward and backward, the rest once) and the reduce-scatter of adapter gradients."""
        blocks = self.wide * shard(self.model.block(), self.ranks) + 4 * shard(self.factors(), self.ranks)
        gathers = 2 * self.model.blocks * blocks + self.wide * shard(self.model.rest(), self.ranks)
        return (self.ranks - 1) * (gathers + 4 * self.model.blocks * shard(self.factors(), self.ranks))

    def received_in_step_by_ddp(self) -> float:
        """A ring all-reduce of the adapter's gradients."""
        return 2 * (self.ranks - 1) / self.ranks * self.adapter_file()

    def received_in_merge(self) -> int:
        """The factors, gathered layer by layer."""
        return (self.ranks - 1) * 4 * self.model.blocks * shard(self.factors(), self.ranks)

    def received_in_export(self) -> int:
        """Every tensor of the base, gathered one by one, and the factors."""
        return (self.ranks - 1) * self.base_shard() + self.received_in_merge()

    def kept_while_merged(self) -> float:
        """By layer: a plain copy of the shard where that is no larger than A, else own factors and kept values."""
        total = 0.0
        for out, into in self.model.linear():
            rows = ceil(out / self.ranks)
            copy, a, b = self.wide * rows * into, 4 * self.r * into, 4 * rows * self.r
            total += copy if copy <= a else a + b + self.kept_share * copy
        return self.model.blocks * total

    def export_adds(self) -> float:
        """At most, while exporting: the largest tensor as it arrives and put together, and its shard merged."""
        shapes = [*self.model.linear(), *self.model.rest()]
        return max(self.wide * ceil(rows / self.ranks) * cols * (2 * self.ranks + 1) for rows, cols in shapes)

    def merged_weights(self) -> int:
        """How many weights each rank merges."""
        return self.model.blocks * shard(self.model.linear(), self.ranks)

    def adapter_file(self) -> int:
        """An adapter checkpoint, without the optimizer's two moments, which are twice as much again."""
        return 4 * self.model.blocks * size(self.model.factors(self.r))

    def full_file(self) -> int:
        """A full or merged checkpoint's base."""
        return self.wide * self.model.parameters()


@dataclass(frozen=True)
class Share:
    """Bytes of each rank under one strategy.

    Attributes:
        base: its part of the base.
        adapter: its part of the adapter, and of all that the optimizer keeps.
        gradients: the adapter's, after a backward.
        step: what it receives in a step. A ring all-reduce of x bytes brings 2 x (n - 1) / n.
        merge: what it receives to merge.
    """

    base: float
    adapter: float
    gradients: float
    step: float
    merge: float


def by_ddp(costs: Costs) -> Share:
    factors = costs.adapter_file()
    return Share(costs.full_file(), 3 * factors, factors, costs.received_in_step_by_ddp(), 0)


def by_fsdp2(costs: Costs) -> Share:
    part = costs.adapter_shard() / 4
    return Share(costs.base_shard(), 3 * part, part, costs.received_in_step(), costs.received_in_merge())


def by_hsdp(costs: Costs, groups: int) -> Share:
    """As FSDP2 in each group. Besides, groups add up the gradients of their shards."""
    inside = by_fsdp2(replace(costs, ranks=costs.ranks // groups))
    return replace(inside, step=inside.step + 2 * (groups - 1) / groups * inside.gradients)


def by_deepspeed(costs: Costs, stage: int) -> Share:
    """Factors have the base's dtype, with float32 copies, which are divided as AdamW's two moments are.

    Stage 3 gathers each layer in the forward and in the backward, but the embedding and the first norm once, whose
    inputs need no gradient. To merge, each rank sends its slice of a factor, and before that where the slice lies.
    """
    n, base = costs.ranks, costs.full_file()
    factors = costs.adapter_file() // 4 * costs.wide
    others = (n - 1) / n
    optimizer = 3 * costs.adapter_file() / n
    if stage == 3:
        once = costs.wide * (size(costs.model.rest()[:1]) + costs.model.hidden)
        step = others * (2 * (base + factors) - once + factors)
        places = 2 * 8 * (n - 1) * costs.model.blocks * len(costs.factors())  # two integers of each factor
        return Share(base / n, factors / n + optimizer, factors / n, step, others * factors + places)
    return Share(base, factors + optimizer, factors if stage == 1 else factors / n, 3 * others * factors, 0)


def by_fsdp1(costs: Costs) -> Share:
    """A unit for each block: gathered in the forward and in the backward, the rest once. Each rank has all factors."""
    n, model, plain = costs.ranks, costs.model, by_ddp(costs)
    gathered = costs.wide * (2 * model.blocks * size(model.block()) + size(model.rest()))
    return replace(plain, base=plain.base / n, step=(n - 1) / n * gathered + plain.step)


STRATEGIES: dict[str, Callable[[Costs], Share]] = {
    "`ddp`": by_ddp,
    "FSDP2": by_fsdp2,
    "HSDP, groups of 8": lambda costs: by_hsdp(costs, costs.ranks // 8),
    "FSDP1": by_fsdp1,
    "DeepSpeed, stage 1": partial(by_deepspeed, stage=1),
    "DeepSpeed, stage 2": partial(by_deepspeed, stage=2),
    "DeepSpeed, stage 3": partial(by_deepspeed, stage=3),
}


def table_of_strategies(ranks: int = 64) -> str:
    """A table in Markdown of what each strategy costs a rank."""
    heads = ["model", "strategy", "base", "adapter, optimizer", "gradients", "a step receives", "to merge, receives"]
    lines = [heads, ["---"] * len(heads)]
    for model in MODELS:
        for name, share in STRATEGIES.items():
            found = share(Costs(model, ranks, columns=True))
            cells = map(amount, (found.base, found.adapter, found.gradients, found.step, found.merge))
            lines.append([model.name, name, *(cell if cell != "0 MB" else "nothing" for cell in cells)])
    return markdown(lines)


def amount(count: float) -> str:
    """Bytes as text for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"


def seconds(count: float) -> str:
    """Two digits."""
    return f"{count:.2g} s" if count < 100 else f"{count:.0f} s"


def table(nanoseconds: float) -> str:
    """A table in Markdown of costs of each rank, with A split by columns.

    `nanoseconds` is the time that one core or device takes to merge a weight.
    """
    heads = ["model", "ranks", "base", "adapter, gradients, moments", "gathered block", "a step receives (A by rows)"]
    heads += ["to merge, receives (A by rows)", "takes", "keeps", "to export, adds", "a step of `ddp` receives"]
    lines = [heads, ["---"] * len(heads)]
    for model in MODELS:
        for ranks in RANKS:
            rows, costs = Costs(model, ranks), Costs(model, ranks, columns=True)
            cells = [model.name, str(ranks)]
            cells += map(amount, (costs.base_shard(), costs.adapter_shard(), costs.gathered_block()))
            cells += [f"{amount(costs.received_in_step())} ({amount(rows.received_in_step())})"]
            cells += [f"{amount(costs.received_in_merge())} ({amount(rows.received_in_merge())})"]
            cells += [seconds(costs.merged_weights() * nanoseconds * 1e-9)]
            cells += map(amount, (costs.kept_while_merged(), costs.export_adds(), costs.received_in_step_by_ddp()))
            lines.append(cells)
    return markdown(lines)


def table_of_files() -> str:
    """A table in Markdown of sizes that do not depend on the number of ranks."""
    heads = ["model", "parameters", "of the adapter", "adapter file", "with AdamW's moments", "merged file"]
    lines = [heads, ["---"] * len(heads)]
    for model in MODELS:
        costs = Costs(model, 1)
        counts = [f"{model.parameters():,}", f"{costs.adapter_file() // 4:,}"]
        files = [costs.adapter_file(), 3 * costs.adapter_file(), costs.full_file()]
        lines.append([model.name, *counts, *map(amount, files)])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table."""
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")
    )


if __name__ == "__main__":
    print(table_of_files(), table(NANOSECONDS), table_of_strategies(), sep="\n\n")
