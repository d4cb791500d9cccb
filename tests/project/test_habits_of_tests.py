"""Rules for the tests themselves: the same inputs everywhere, and warnings are ignored only by their text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from support.runs.notices import OUR_WARNINGS

HERE = Path(__file__)
TESTS = HERE.parents[1]
ROOT = HERE.parents[2]
FILES = {str(p.relative_to(TESTS)): p.read_text() for p in sorted(TESTS.rglob("*.py")) if p != HERE}
NARROW = re.compile(r"ignore:([^:]{10,}|\{\w+\})")  # no category: a newer release may warn by another one


def test_hypothesis_settings_of_every_test_are_those_of_the_profile():
    assert hypothesis.settings.default.derandomize
    assert hypothesis.settings.default.database is None
    assert {name for name, text in FILES.items() if re.search(r"\b(derandomize|database) *=", text)} == {"conftest.py"}


IN_TEXT = re.compile(r"""["'](ignore:(?:[^"\\\n]|\\.)*)["']""")
BY_CALL = re.compile(r"""(?:filterwarnings|simplefilter)\(\s*["']ignore["'][^\n]*""")
BY_TEXT = re.compile(r"""filterwarnings\("ignore", (?:message|[rf]*"[^"]+")\)+,?""")


def filters(text: str) -> Iterator[tuple[str, bool]]:
    """Each place of a file that passes over warnings, and whether it names a text and no category."""
    for written in IN_TEXT.findall(text):
        yield written, NARROW.fullmatch(written) is not None
    for written in BY_CALL.findall(text):
        yield written, BY_TEXT.match(written) is not None


def test_filters_of_warnings_name_their_text():
    broad = {name: [written for written, narrow in filters(text) if not narrow] for name, text in FILES.items()}
    assert {name: written for name, written in broad.items() if written} == {}
    in_project = re.findall(r'"(ignore:.*?)"', (ROOT / "pyproject.toml").read_text())
    assert in_project
    assert all(map(NARROW.fullmatch, in_project))
    assert [name for name, text in FILES.items() if re.search(r"[\"']-W[\"' ,]*ignore[\"']", text)] == []


BROAD = """
x("ignore:short")
x("ignore::UserWarning")
x("ignore:all of this:UserWarning")
w.simplefilter("ignore")
w.simplefilter("ignore", UserWarning)
w.filterwarnings("ignore", "some text", UserWarning)
w.filterwarnings("ignore", category=UserWarning)
"""


def test_the_reader_of_filters_tells_broad_ones_from_narrow_ones():
    assert [narrow for _, narrow in filters(BROAD)] == [False] * 7
    narrow = 'x("ignore:all of this")', 'w.filterwarnings("ignore", "some text")'
    assert [narrow for text in narrow for _, narrow in filters(text)] == [True] * 2


# --- where tests are ---


def test_each_folder_of_tests_is_in_the_table_of_their_page():
    rows = re.findall(r"^\| `(\w+)/` \|", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted({name.split("/")[0] for name in FILES if "/" in name})


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them all by their last names."""
    names = [Path(name).name for name in FILES if Path(name).name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# --- what .ci/run tests with the oldest and the newest versions ---


def test_a_smoke_test_that_is_chosen_or_left_out_exists():
    """pytest passes over a name that it does not find among those that are left out."""
    lines = (ROOT / ".ci" / "smoke_tests.txt").read_text().splitlines()
    names = [re.sub("^--(deselect|ignore|ignore-glob)=", "", line) for line in lines if line and line[0] != "#"]
    assert len(names) > 20
    for name in names:
        file, _, test = name.partition("::")
        paths = list(ROOT.glob(file))
        assert paths, name
        assert not test or f"def {test.partition('[')[0]}(" in paths[0].read_text(), name


def beginnings_of_warnings() -> list[str]:
    """The first words of each text that the package warns with, where the call shows them."""
    package = ROOT / "lightning_lora"
    calls = [node for path in package.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    texts = [
        call.args[0] for call in calls if isinstance(call, ast.Call) and call.args and "warn(" in ast.unparse(call)[:20]
    ]
    firsts = [text.values[0] if isinstance(text, ast.JoinedStr) else text for text in texts]
    return [first.value for first in firsts if isinstance(first, ast.Constant) and isinstance(first.value, str)]


@pytest.mark.slow
def test_warnings_of_this_package_are_errors_in_every_process_and_begin_as_the_filter_says():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"error:{OUR_WARNINGS}"' in project
    assert len(shown := beginnings_of_warnings()) > 10
    assert [text for text in shown if not re.match(OUR_WARNINGS, text)] == []
