"""run.py measures every table of README.md by its name, and README.md says in each section which name that is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run

import report

PAGE = Path(__file__).with_name("README.md").read_text()


def sections() -> dict[str, str]:
    """The text of each section by its heading."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def header_of() -> dict[str, list[str]]:
    pytest.importorskip("bitsandbytes")
    return {name: program.headers() for name, program in run.PROGRAMS.items()}


def test_every_table_of_the_page_is_of_a_program_that_its_section_names(header_of: dict[str, list[str]]):
    tables = report.read_tables(PAGE)
    assert len(tables) >= 12
    for heading, header, rows in tables:
        line = f"| {' | '.join(header)} |"
        programs = [name for name, headers in header_of.items() if line in headers]
        assert any(f"`run.py {name}`" in sections()[heading] for name in programs), (heading, programs)
        assert rows
        assert all(len(row) == len(header) for row in rows)


def test_every_program_is_named_on_the_page_and_the_command_lists_it(capsys: pytest.CaptureFixture[str]):
    run.main(["--help"])
    listed = capsys.readouterr().out
    for name in run.PROGRAMS:
        assert f"`run.py {name}`" in PAGE
        assert f"\n  {name} " in listed
    assert set(re.findall(r"run\.py (\w+)", PAGE)) <= {*run.PROGRAMS, run.ALL}


def test_programs_that_measure_are_no_others():
    """A new file that prints a table gets a name."""
    files = {file.stem for file in Path(__file__).parent.glob("*.py") if "\ndef main(" in file.read_text()}
    assert files == {program.file for program in run.PROGRAMS.values()} | {"run", "report", "resident"}


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
        (["dora"], [("dora", ["--seconds", "5", "--threads", "1"])]),
        (["dora", "--seconds", "9"], [("dora", ["--seconds", "9"])]),
        (["launches", "large"], [("launches", []), ("merge_large", ["--gigabytes", "2", "8"])]),
        (["all"], [(program.file, program.options.split()) for program in run.PROGRAMS.values()]),
    ],
)
def test_names_choose_programs_and_options_are_the_pages_unless_given(given: list[str], expected: Any, calls: Any):
    run.main(given)
    assert calls == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [(["lora"], "'lora' is no table"), (["dora", "swap", "--seconds", "1"], "Options are for one table, not for 2")],
)
def test_an_unknown_name_and_options_for_several_are_refused(given: list[str], message: str, calls: Any):
    with pytest.raises(SystemExit, match=message):
        run.main(given)
    assert calls == []


# --- what the page says of the figures ---


def test_the_page_lists_each_ratio_to_peft_above_one():
    shown = PAGE.split(report.BEGIN_SLOWER)[1].split(report.END_SLOWER)[0].strip()
    assert shown == report.slower(PAGE)
    assert re.search(r"\[DoRA\]\(#dora\), merge cycle: 1\.\d\d \(d 256, float32\)", shown)


def test_only_ratios_to_peft_above_one_are_listed():
    page = (
        "## One thing\n\n| model | dtype | step | of peft | of the floor | peak | of peft |\n"
        "|---|---|---|---|---|---|---|\n"
        "| a | float32 | 3 ms | 1.00 | 2.00 | 4 MiB | 1.20 |\n| b | float32 | 3 ms | 1.30 | 2.00 | 4 MiB | 0.90 |\n"
    )
    assert report.slower(page) == (
        "- [One thing](#one-thing), peak: 1.20 (a, float32)\n- [One thing](#one-thing), step: 1.30 (b, float32)"
    )


def test_every_ratio_to_peft_is_in_a_column_that_is_looked_at():
    known = {
        *report.TO_PEFT,
        "peft's of peft's LoRA",
        "against peft",
        "bytes / peft's",
        "peft's",
        "peft",
        "peft's sums alone",
    }
    assert {name for _, header, _ in report.read_tables(PAGE) for name in header if "peft" in name} <= known
