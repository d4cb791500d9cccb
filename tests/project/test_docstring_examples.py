"""Every public function and class has an example in its docstring, which runs and prints what it shows.

An example knows torch, nn, Lightning as L, and all public names. It runs in a folder of its own, without a network.
"""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_lora
from lightning_lora.metrics import MergeError, MergeFidelity
from support.models.variants import variants_forgotten
from support.runs.notices import PEER_NOTICES

pytestmark = pytest.mark.filterwarnings(*PEER_NOTICES)

PUBLIC: dict[str, Any] = {name: getattr(lightning_lora, name) for name in (*lightning_lora.__all__, "LoRACLI")}
PUBLIC |= {metric.__name__: metric for metric in (MergeError, MergeFidelity)}
METHODS: dict[str, Callable[..., Any]] = {  # which users call on classes
    f"{name}.{method}": function
    for name, owner in PUBLIC.items()
    if inspect.isclass(owner)
    for method, function in inspect.getmembers(owner, inspect.ismethod)  # classmethods
    if method == "from_peft"
}
DOCUMENTED = PUBLIC | METHODS
KNOWN = {"torch": torch, "nn": nn, "L": L, **PUBLIC}
NEEDED = {"quantize_base": "torchao"}  # packages of extras that an example needs
FEW_LINES = 14


def example(name: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(inspect.getdoc(DOCUMENTED[name]), dict(KNOWN), name, None, None)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_has_a_short_example_which_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    lines = inspect.getdoc(DOCUMENTED[name]).splitlines()
    assert lines.count("Example::") == 1
    shown = lines[lines.index("Example::") + 1 :]
    assert shown[0] == ""
    assert shown[1].startswith("    >>> ")
    assert len(shown) - 1 <= FEW_LINES
    assert all(line.startswith("    ") for line in shown[1:])  # it comes last, after what an editor shows first
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])  # which a LightningCLI reads
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which it writes
    failed: list[str] = []
    with variants_forgotten():
        result = doctest.DocTestRunner(verbose=False).run(example(name), out=failed.append)
    assert result.attempted > 0
    assert failed == []
