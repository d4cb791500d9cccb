"""The benchmarks run, and every row is a number."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent / "benchmarks" / "run.py"


def test_merging_and_memory_give_finite_rows(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(RUN), "--quick", "--threads", "1", "--only", "c,d", "--json", str(file)]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    rows = json.loads(file.read_text())["rows"]
    assert {row["group"] for row in rows} == set("cd")
    assert all(math.isfinite(row["value"]) for row in rows)
    judged = [row for row in rows if row["target"] is not None]
    assert judged
    assert all(row["verdict"] == ("reached" if row["value"] <= row["target"] else "not reached") for row in judged)
