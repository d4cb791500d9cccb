"""A transaction: its changes are taken back where the block raises, wherever it is broken off, and kept where not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lightning_lora.model.transaction import transaction
from support.runs.broken_off import break_off


def changed(*undone: Callable[[], object]) -> None:
    """A transaction that raises KeyError at its end."""
    with transaction() as on_error:
        for each in undone:
            on_error.callback(each)
        raise KeyError


def test_changes_are_kept_where_the_block_ends_and_taken_back_last_first_where_it_raises():
    calls: list[int] = []
    with transaction() as on_error:
        on_error.callback(calls.append, 1)
    assert calls == []
    with pytest.raises(KeyError):
        changed(*(partial(calls.append, number) for number in (1, 2, 3)))
    assert calls == [3, 2, 1]


def test_what_cannot_be_taken_back_hinders_no_other():
    calls: list[int] = []
    with pytest.raises(ZeroDivisionError) as caught:
        changed(partial(calls.append, 1), partial(divmod, 1, 0))
    assert calls == [1]
    assert isinstance(caught.value.__context__, KeyError)


def test_a_transaction_broken_off_before_any_of_its_own_lines_is_done_or_not():
    found = []
    for line in range(20):
        values = {"a": 0, "b": 0}

        def change(values: dict[str, Any] = values) -> None:
            with transaction() as on_error:
                for name in values:
                    on_error.callback(values.__setitem__, name, 0)
                    values[name] = 1

        reached = break_off(change, line, also=(__file__,))
        assert len(set(values.values())) == 1, line
        found.append(values["a"])
        if not reached:
            break
    assert found[0] == 0
    assert found[-1] == 1
    assert not reached
