"""Rules for the tests themselves: the same inputs everywhere, and warnings are ignored only by their text."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.notices import OUR_WARNINGS

HERE = Path(__file__)
TESTS = HERE.parents[1]
ROOT = HERE.parents[2]
FILES = {str(p.relative_to(TESTS)): p.read_text() for p in sorted(TESTS.rglob("*.py")) if p != HERE}
NARROW = re.compile(r"ignore:([^:]{10,}|\{\w+\})")  # no category: a newer release may warn by another one


def test_hypothesis_settings_of_every_test_are_those_of_the_profile():
    assert hypothesis.settings.default.derandomize
    assert hypothesis.settings.default.database is None
    assert {name for name, text in FILES.items() if re.search(r"\b(derandomize|database) *=", text)} == {"conftest.py"}


@pytest.mark.slow
def test_hypothesis_draws_do_not_depend_on_what_else_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[int | str] = []

    @given(st.integers() | st.text())
    @settings(max_examples=300)
    def draw(value: int | str) -> None:
        drawn.append(value)

    draw()
    first, drawn[:] = list(drawn), []
    path = tmp_path / "other.py"
    path.write_text(f"A = {[f'word {i}' for i in range(99)]}, {[10**9 + i for i in range(99)]}")
    module = ModuleType("other")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "other", module)
    draw()
    assert drawn == first


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return str(getattr(node.func, "attr", getattr(node.func, "id", "")))


def filters(text: str) -> Iterator[tuple[str, bool]]:
    """Each place of a file that passes over warnings, and whether it names a text and no category."""
    nodes = list(ast.walk(ast.parse(text)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and id(node) not in parts):
            written = ast.unparse(node)[1:].strip("'\"")
            if re.match("['\"]?ignore:", written):
                yield written, NARROW.fullmatch(written) is not None
        elif isinstance(node, ast.Call) and called(node) in ("filterwarnings", "simplefilter"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and first.value == "ignore":
                named = len(node.args) == 2 and not node.keywords
                yield ast.unparse(node), named and called(node) == "filterwarnings"


MAY_FILTER = {name: text for name, text in FILES.items() if re.search(r"['\"]ignore", text)}  # read without parsing


@pytest.mark.parametrize("name", [name for name, text in MAY_FILTER.items() if any(filters(text))])
def test_a_filter_of_warnings_names_their_text(name: str):
    assert [written for written, narrow in filters(FILES[name]) if not narrow] == []


def test_the_projects_filters_of_warnings_name_their_text():
    written = re.findall(r'"(ignore:.*?)"', (ROOT / "pyproject.toml").read_text())
    assert written
    assert all(map(NARROW.fullmatch, written))


def test_no_program_that_a_test_starts_passes_over_all_warnings():
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

SMOKE = [
    line.removeprefix("--deselect=").removeprefix("--ignore=")
    for line in (ROOT / ".ci" / "smoke_tests.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("name", SMOKE)
def test_a_smoke_test_that_is_chosen_or_left_out_exists(name: str):
    """pytest passes over a name that it does not find among those that are left out."""
    file, _, test = name.removeprefix("--ignore-glob=").partition("::")
    paths = list(ROOT.glob(file))
    assert paths
    assert not test or f"def {test.partition('[')[0]}(" in paths[0].read_text()


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
