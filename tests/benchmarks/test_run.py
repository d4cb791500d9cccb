"""run.py measures every table of README.md, and README.md shows in bold where another package is faster or leaner."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run

PAGE = Path(__file__).with_name("README.md").read_text()


def read_tables() -> list[tuple[str, list[str], list[list[str]]]]:
    """Return each table of the page: the heading above it, its header, and its rows."""
    tables: list[tuple[str, list[str], list[list[str]]]] = []
    heading, lines = "", PAGE.splitlines()
    for before, line in itertools.pairwise(lines):
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if line.startswith("|---"):
            tables.append((heading, cells_of(before), []))
        elif line.startswith("|") and before.startswith("|"):
            tables[-1][2].append(cells_of(line))
    return tables


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_table_of_the_page_is_of_a_program():
    tables = read_tables()
    headers = {header for program in run.PROGRAMS.values() for header in program.headers()}
    assert {f"| {' | '.join(header)} |" for _, header, _ in tables} == headers
    for _, header, rows in tables:
        assert rows
        assert all(len(row) == len(header) for row in rows)


def test_every_program_is_listed_and_the_page_names_no_other(capsys: pytest.CaptureFixture[str]):
    run.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in run.PROGRAMS)
    assert set(re.findall(r"run\.py (\w+)", PAGE)) <= {*run.PROGRAMS}


def test_programs_that_measure_are_no_others():
    """A new file that prints a table gets a name."""
    files = {file.stem for file in Path(__file__).parent.glob("*.py") if "\ndef main(" in file.read_text()}
    assert files == {program.file for program in run.PROGRAMS.values()} | {"run", "report"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The programs that are run, and with which options."""
    made: list[tuple[str, list[str]]] = []
    program = lambda file: SimpleNamespace(main=lambda options: made.append((file, options)))  # noqa: E731
    monkeypatch.setattr(run.importlib, "import_module", program)
    return made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], [("network", [])]),
        (["swap"], [("swap", [])]),
        (["swap", "--seconds", "9"], [("swap", ["--seconds", "9"])]),
        (["launches", "large"], [("launches", []), ("merge_large", [])]),
        (["all"], [(program.file, []) for program in run.PROGRAMS.values()]),
    ],
)
def test_names_choose_programs_and_options_are_passed_on(given: list[str], expected: Any, calls: Any):
    run.main(given)
    assert calls == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [(["lora"], "'lora' is no table"), (["drift", "swap", "--seconds", "1"], "Options are for one table, not for 2")],
)
def test_an_unknown_name_and_options_for_several_are_refused(given: list[str], message: str, calls: Any):
    with pytest.raises(SystemExit, match=message):
        run.main(given)
    assert calls == []


# --- what the page says of the figures ---


RATIOS = ("of peft", "of peft's", "against peft", "against loralib", "bytes / peft's", "of our loading anew")


def test_a_ratio_is_bold_where_the_other_one_is_faster_or_leaner():
    found = []
    for heading, header, rows in read_tables():
        columns = [column for column, name in enumerate(header) if name.startswith(RATIOS)]
        texts = [text for row in rows for column in columns for text in row[column].split(", ") if text]
        for text in texts:
            assert text.startswith("**") == (float(text.strip("*")) > 1), (heading, text)
        found += texts
    assert len(found) > 100
