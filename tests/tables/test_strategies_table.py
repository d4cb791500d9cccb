"""The table of strategies: each is trained, saved, resumed, read and broken, and compared with one device.

The outcomes are compared with tests/distributed/strategies.md. WRITE_TABLE=1 in the environment writes that page; lines
of what is not installed stay as they are there. support/ranks/strategies.py has the runs.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import load_adapter, merged_state_dict
from support.ranks.deepspeed import gathered_by_deepspeed
from support.ranks.fsdp1 import fsdp1, gathered_by_fsdp1
from support.ranks.processes import world
from support.ranks.sharded import BATCHES, base_of, model_parallel, whole_state
from support.ranks.sharded_adapters import assert_same_bits
from support.ranks.strategies import (
    BREAKS_IN,
    EPOCHS,
    LAST,
    SCALING,
    ExpertsOfFSDP2,
    OfExperts,
    OfFSDP2,
    OfHSDP,
    OfTensorParallel,
    Refused,
    Run,
    State,
    Strategy,
    Watched,
    WithFabric,
    WithTrainer,
    by_tensor,
    columns_on_ranks,
    fsdp1_by_layers,
    import_package,
    on_one_device,
    resume,
    stage_1,
    stage_2,
    stage_3,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),  # in one process
]
PAGE = Path(__file__).parents[1] / "distributed" / "strategies.md"
HOW_TO_WRITE = "write the page with WRITE_TABLE=1 pytest -n 0 -m slow tests/tables/test_strategies_table.py"
CLOSE = 1e-6

OF_FSDP1: Any = {"state": gathered_by_fsdp1, "restores": False}

# FSDP2 is trained by four ranks too: no other strategy has code of its own for their number.
STRATEGIES: list[Strategy] = [
    WithTrainer("one device", 1, 2, Watched, on_one_device),
    WithTrainer("`ddp`", 2, 4, Watched, on_one_device),
    WithTrainer("FSDP2", 2, 4, OfFSDP2, model_parallel),
    WithTrainer("FSDP2", 4, 2, OfFSDP2, model_parallel),
    WithTrainer("FSDP2, a stack of experts", 2, 4, ExpertsOfFSDP2, model_parallel, experts=True),
    WithTrainer("HSDP", 4, 2, OfHSDP, model_parallel),
    WithTrainer("tensor parallel", 2, 4, OfTensorParallel, by_tensor, tensor=2),
    WithTrainer("tensor parallel and FSDP2", 4, 2, OfTensorParallel, by_tensor, tensor=2, restores=False),
    WithTrainer("DeepSpeed, stage 1", 2, 4, Watched, stage_1, package="deepspeed"),
    WithTrainer("DeepSpeed, stage 2", 2, 4, Watched, stage_2, package="deepspeed"),
    WithTrainer("DeepSpeed, stage 3", 2, 4, Watched, stage_3, package="deepspeed", state=gathered_by_deepspeed),
    WithTrainer("FSDP1, one unit", 2, 4, Watched, fsdp1, **OF_FSDP1),
    WithTrainer("FSDP1, a unit for each layer", 2, 4, Watched, fsdp1_by_layers, **OF_FSDP1),
    WithFabric("Fabric, `ddp`", 2, 4, sharded=False),
    WithFabric("Fabric, FSDP2", 2, 4, sharded=True),
]


def name_of(row: Strategy) -> str:
    return f"{row.label}, {row.ranks} ranks" if row.ranks > 1 else row.label


# --- what each column asks for ---


@dataclass(frozen=True)
class Done:
    """What came of a line: a dictionary for each rank, and the runs of the ranks that resumed elsewhere."""

    row: Strategy
    path: Path
    ranks: list[dict[str, Any]]
    elsewhere: list[Run]

    def runs(self, column: str) -> list[Run]:
        return [each[column] for each in self.ranks]


@functools.cache
def alone(experts: bool) -> tuple[Run, State]:
    """The run of one device that all others are compared with, and its merged weights."""
    row = WithTrainer("", 1, 2, OfExperts, on_one_device, experts=True) if experts else STRATEGIES[0]
    with tempfile.TemporaryDirectory() as path:
        model, run = row.fit(Path(path), None, 0, "")
    return run, merged_state_dict(model)


def assert_run(row: Strategy, run: Run, epochs: int) -> None:
    """Check the last epochs: merged in each batch of validation, the numbers of one device, the bits of the base."""
    assert run.merged == [True] * (epochs * BATCHES)
    expected = alone(row.experts)[0]
    assert run.losses == pytest.approx(expected.losses[-epochs:], abs=CLOSE)
    assert_close(run.state, expected.state)
    assert_same_bits(base_of(run.state), whole_state(row.plain()))


def assert_close(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=CLOSE, rtol=0)


def merged_by_hand(run: Run, merged: State) -> State:
    """W + s * B @ A in float64, and of experts what one device gives: test_layers_table.py has their formula."""
    state = run.state
    whole = {
        name: merged[name].double() if "stack" in name else value.double() for name, value in base_of(state).items()
    }
    for name in sorted(name for name in state if name.endswith(".lora_A")):
        layer = name.removesuffix(".lora_A")
        whole[f"{layer}.weight"] += SCALING * state[f"{layer}.lora_B"].double() @ state[name].double()
    return {name: value.float() for name, value in whole.items()}


def fitted(done: Done) -> None:
    for run in done.runs("fit"):
        assert_run(done.row, run, EPOCHS)


def saved(done: Done) -> None:
    found = done.row.content(done.path / "run" / LAST)
    state = done.runs("fit")[0].state
    factors = sorted(name for name in state if "lora_" in name)
    assert len(factors) == 6
    assert sorted(found) == factors
    assert_same_bits(found, {name: state[name] for name in factors})


def resumed(done: Done) -> None:
    for run in done.runs("resume"):
        assert_run(done.row, run, 1)


def resumed_elsewhere(done: Done) -> None:
    assert len(done.elsewhere) == done.row.others
    for run in done.elsewhere:
        assert_run(done.row, run, 1)


def evaluated(done: Done) -> None:
    for run in done.runs("evaluate"):
        assert_run(done.row, run, 1)


def loaded(done: Done) -> None:
    assert_same_bits(done.row.load(done.path / "run" / LAST), done.runs("fit")[0].state)


def adapter_saved(done: Done) -> None:
    load_adapter(model := done.row.plain(), done.path / "adapter")
    assert_same_bits(whole_state(model), done.runs("fit")[0].state)


def merged_saved(done: Done) -> None:
    assert_close(load_file(done.path / "merged" / "model.safetensors"), merged_by_hand(*alone(done.row.experts)))


def broken_off(done: Done) -> None:
    for run in done.runs("exception"):
        assert run.error == "division by zero"
        assert run.merged == [True] * (BREAKS_IN * BATCHES + 1)
        if done.row.restores:
            assert run.said == []
            assert_same_bits(base_of(run.state), whole_state(done.row.plain()))
        else:
            assert all("the model stays merged: " in each for each in run.said)


def unmerged_where_not_finite(done: Done) -> None:
    for fault in ("a loss", "a weight"):
        runs = done.runs(fault)
        skipped = fault == "a loss" and done.row.package == "deepspeed"
        for run in runs:
            assert run.merged == [True] * (BREAKS_IN * BATCHES) + [skipped] * BATCHES
            assert_same_bits(base_of(run.state), whole_state(done.row.plain()))
            assert len(set(run.losses)) == 1 or not skipped
        if not skipped:
            assert "merge: layer 'net.0': W + s * B @ A is not finite" in runs[0].said[0]


@dataclass(frozen=True)
class Column:
    """What is asked of each strategy.

    Attributes:
        check: raises where it is not right.
        meaning: for the page.
    """

    label: str
    check: Callable[[Done], None]
    meaning: str


COLUMNS = [
    Column(
        "fit",
        fitted,
        "three epochs with AdamW. Every validation runs merged. Losses and adapters equal those of one device up to "
        "1e-6, and the base keeps every bit",
    ),
    Column("save", saved, "a checkpoint has the adapter's tensors, with the bits of the run, and no other weight"),
    Column("resume", resumed, "from the second epoch's checkpoint, by as many ranks: as `fit`"),
    Column("elsewhere", resumed_elsewhere, "the same by four ranks instead of two, or two of four"),
    Column("evaluate", evaluated, "a new model validates merged from the last checkpoint: as `fit`"),
    Column("load", loaded, "the checkpoint is loaded in one process: every bit of the run"),
    Column("save_adapter", adapter_saved, "the folder is loaded in one process: every bit"),
    Column("save_merged", merged_saved, "plain weights, which are W + s * B @ A up to 1e-6"),
    Column(
        "exception",
        broken_off,
        "raised inside a merged forward, it reaches the caller unchanged. The model is unmerged, the base keeps every "
        "bit. Under FSDP1, and where FSDP2 gathers adapted layers in its outermost module, it stays merged, with a "
        "warning",
    ),
    Column(
        "NaN",
        unmerged_where_not_finite,
        "in a loss of one rank, and in one rank's shard of a factor (in all of it where it is not sharded): all ranks "
        "validate unmerged, with a warning, and the base keeps every bit. DeepSpeed itself skips the steps of such a "
        "loss, so that validation stays merged",
    ),
]
HEAD = """# Strategies

<!-- written by tests/tables/test_strategies_table.py -->

Each strategy (a row) does everything that a user may ask of it (a column), with a small network on CPU processes. A
test runs every row and compares this page with the outcome.

"right" means as listed. "refused" shows how the error begins, before training.

"""


@functools.cache
def outcomes(row: Strategy) -> dict[str, str]:
    """Run a line: its outcomes by column, which are right or refused before training. Anything else raises."""
    if row.package and find_spec(row.package) is None:
        pytest.skip(f"needs the extra `{row.package}`")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if row.ranks == 1:
            ranks = [columns_on_ranks(row, path)]
        else:
            if row.package:
                for size in (row.ranks, row.others):
                    world(size).run(import_package, row.package, timeout=240)
            ranks = world(row.ranks).run(columns_on_ranks, row, path, timeout=240)
        first = ranks[0]["fit"]
        if isinstance(first, Refused):
            return {column.label: f"refused: {' '.join(first.message.split()[:8])} ..." for column in COLUMNS}
        done = Done(row, path, ranks, world(row.others).run(resume, row, path))
        for column in COLUMNS:
            column.check(done)
        return {column.label: "right" for column in COLUMNS}


# --- the page ---


def render(rows: dict[str, dict[str, str]]) -> str:
    lines = [f"- **{column.label}**: {column.meaning}." for column in COLUMNS]
    lines += ["", f"| | {' | '.join(column.label for column in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells[column.label] for column in COLUMNS)} |" for name, cells in rows.items()]
    return HEAD + "\n".join(lines) + "\n"


@functools.cache
def on_the_page() -> dict[str, dict[str, str]]:
    """What the page says of each strategy."""
    columns, _, *rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


def test_the_page_has_all_strategies():
    if os.environ.get("WRITE_TABLE"):
        rows = on_the_page() if PAGE.exists() else {}
        for row in STRATEGIES:
            try:
                rows[name_of(row)] = outcomes(row)
            except pytest.skip.Exception:
                continue
        PAGE.write_text(render({name: rows[name] for name in map(name_of, STRATEGIES) if name in rows}))
        on_the_page.cache_clear()
    assert PAGE.read_text() == render(on_the_page()), HOW_TO_WRITE
    assert list(on_the_page()) == [name_of(row) for row in STRATEGIES], HOW_TO_WRITE


@pytest.mark.parametrize("row", STRATEGIES, ids=name_of)
def test_a_strategy_gives_the_outcomes_in_the_page(row: Strategy):
    assert outcomes(row) == on_the_page().get(name_of(row)), HOW_TO_WRITE
