"""The table of compositions in tests/README.md is what the compositions give.

With WRITE_TABLE=1 in the environment the test writes it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from compositions_table import ROWS, outcome, render

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = (
    "<!-- compositions: written by tests/trainer/test_compositions_table.py -->\n",
    "<!-- end of compositions -->",
)
STRATEGIES = ("ddp_spawn", "ddp_fork", "ddp_notebook")


@pytest.mark.filterwarnings(
    "ignore:lightning_lora. base parameters were unfrozen:UserWarning",
    "ignore:The provided params to be frozen already exist:UserWarning",
    "ignore:lightning_lora. 4 adapter parameters are frozen:UserWarning",
    "ignore:Found . module.s. in eval mode at the start of training:UserWarning",
    "ignore:lightning_lora. merged 16-bit weights:UserWarning",
    "ignore:`.fit.ckpt_path=None.` was called without a model:UserWarning",
    "ignore:.*ckpt_path=.last.. is set, but there is no last checkpoint:UserWarning",
)
def test_the_table_in_the_readme(tmp_path, launched: dict[str, Any]):
    outcomes = {name: outcome(case, tmp_path / str(i)) for i, (name, case) in enumerate(ROWS.items())}
    for strategy in STRATEGIES:
        found = launched[strategy]
        assert all(found[name] for name in ("arrived", "base", "trained", "saved after"))
        assert not found["merged"]
        outcomes[f"{strategy} after inject()"] = "right"
    before, rest = README.read_text().split(BEGIN)
    table, after = rest.split(END)
    if os.environ.get("WRITE_TABLE"):
        README.write_text(f"{before}{BEGIN}\n{render(outcomes)}\n\n{END}{after}")
    else:
        assert table.strip() == render(outcomes)
