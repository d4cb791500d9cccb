"""Steps that all ranks take together: a failure of one rank is raised on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_lora import (
    LoRAError,
    is_merged,
    merge,
    merged_state_dict,
)
from lightning_lora.distributed.rank_sync import RankSync
from lightning_lora.errors import NonFiniteError
from support.ranks import sharded
from support.ranks.processes import world
from support.ranks.sharded import (
    base_of,
    shard_,
    whole_state,
)
from support.ranks.sharded_adapters import assert_same_bits, injected


def one_bad_rank(bad: int) -> str:
    net = shard_(injected())
    before = whole_state(net)
    if dist.get_rank() == bad:
        with torch.no_grad():
            net[2].lora_B.to_local()[0, 0] = torch.nan
    with pytest.raises(LoRAError, match="layer '2'") as caught:
        merge(net)
    assert not is_merged(net)
    assert_same_bits(base_of(whole_state(net)), base_of(before))
    with pytest.raises(LoRAError, match="layer '2'"):
        merged_state_dict(net)
    return str(caught.value)


def test_no_step_runs_after_one_that_failed_and_the_first_failure_is_raised():
    sync, ran = RankSync([]), []

    def fail(what: str) -> None:
        raise LoRAError(what)

    sync.run("one", ran.append, 1)
    sync.run("two", fail, "broken")
    sync.run("three", ran.append, 3)
    sync.run("four", fail, "broken too")
    assert ran == [1]
    with pytest.raises(LoRAError, match=r"^two: broken\.$"):
        sync.raise_on_any_rank()


def test_of_a_failed_step_and_one_inside_it_the_inner_one_is_raised_and_a_step_is_named_by_its_own_name():
    sync = RankSync([])

    def outer(error: Exception | None) -> None:
        sync.run("inner", raise_error if error else None, error)
        raise LoRAError("unwritten")

    sync.run("outer", outer, LoRAError("broken"))
    with pytest.raises(LoRAError, match=r"^inner: broken\.$"):
        sync.raise_on_any_rank()
    sync.failed = None
    sync.run("another", outer, None)
    with pytest.raises(LoRAError, match=r"^another: unwritten\.$"):
        sync.raise_on_any_rank()


@pytest.mark.parametrize("bad", [0, 1])
def test_a_layer_that_fails_on_one_rank_fails_on_all(bad):
    messages = world().run(one_bad_rank, bad)
    assert "not finite" in messages[bad]
    assert "on another rank" in messages[1 - bad]


def failures(first: BaseException | None, second: BaseException | None) -> str:
    """What this rank raises where each has a step that fails in its own way."""
    sync = RankSync([shard_(sharded.network())[0].weight])
    errors = [first, second]
    for rank, error in enumerate(errors):
        sync.run(f"step {rank}", raise_error if dist.get_rank() == rank and error else None, error)
    try:
        sync.raise_on_any_rank()
    except Exception as error:
        return type(error).__name__
    return ""


def raise_error(error: BaseException) -> None:
    raise error


FAILURES: list[tuple[Any, Any, list[str]]] = [
    (None, None, ["", ""]),
    (NonFiniteError(), None, ["NonFiniteError", "NonFiniteError"]),
    (NonFiniteError(), NonFiniteError(), ["NonFiniteError", "NonFiniteError"]),
    (NonFiniteError(), LoRAError(), ["LoRAError", "LoRAError"]),
    (LoRAError(), NonFiniteError(), ["LoRAError", "LoRAError"]),
    (NonFiniteError(), OSError(), ["LoRAError", "OSError"]),
]


def all_failures() -> list[str]:
    return [failures(first, second) for first, second, _ in FAILURES]


def test_ranks_agree_on_whether_values_alone_were_not_finite():
    assert list(zip(*world().run(all_failures), strict=True)) == [tuple(expected) for *_, expected in FAILURES]
