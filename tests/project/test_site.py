"""The site's own code: which pages it has, how it reads their lists, and how it finds links that lead nowhere.

.ci/run builds the site, where every link of every page is checked.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import lightning_lora

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".github" / "site"


@pytest.fixture
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", SITE / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_of_the_repository_has_its_place_in_the_navigation(pages: ModuleType):
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    listed = files(yaml.safe_load((SITE / "mkdocs.yml").read_text())["nav"])
    assert len(listed) > 20
    assert sorted(listed) == sorted(pages.repository_pages())


def test_every_public_name_gets_a_page(pages: ModuleType):
    assert set(pages.public_names()) == {*lightning_lora.__all__, "LoRACLI"}


def test_sources_and_pictures_that_a_page_links_are_part_of_the_site(pages: ModuleType):
    linked = set(pages.linked_files("examples/README.md"))
    assert {"examples/digits.py", "examples/digits.yaml", "lightning_lora/nn/variant.py"} <= linked
    assert "examples/finetune.ipynb" in pages.linked_files("README.md")
    assert "tests/benchmarks/drift.png" in pages.linked_files("tests/benchmarks/README.md")
    assert [name for name in linked if name.endswith(".md")] == []


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("text\n- a\n- b", "text\n\n- a\n- b"),
        ("- a\n  more of it\n- b", "- a\n    more of it\n- b"),
        ("- a\n  - b\n- c", "- a\n    - b\n- c"),
        ("1. a\n   of:\n   - b\n   - c", "1. a\n    of:\n\n    - b\n    - c"),
        ("1. a\n\n   text\n2. b", "1. a\n\n    text\n\n2. b"),
        ("```\ntext\n- no list\n  - nor here\n```", "```\ntext\n- no list\n  - nor here\n```"),
        ("- a", "- a"),
    ],
)
def test_lists_are_read_as_they_are_on_github(pages: ModuleType, written: str, read: str):
    assert pages.with_nested_lists(written) == read


def test_a_notebook_is_shown_cell_by_cell_with_a_link_to_its_file(pages: ModuleType, tmp_path: Path):
    hidden = {"jupyter": {"source_hidden": True}}
    cells = [("markdown", "# A", {}), ("code", "a = 1\nb = 2", {}), ("code", "c = 3\nd = 4", hidden)]
    cells = [{"cell_type": kind, "source": [text], "metadata": metadata} for kind, text, metadata in cells]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert pages.source_page(tmp_path / "a.ipynb") == (
        '# A\n\n<a href="a.ipynb" download>Download a.ipynb</a>\n\n```python\na = 1\nb = 2\n```\n\n'
        '<details markdown="1"><summary>c = 3</summary>\n\n```python\nc = 3\nd = 4\n```\n\n</details>\n'
    )


def shown(pages: ModuleType, name: str, markdown: str) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name), meta={})
    return pages.on_page_markdown(markdown, page, None, None)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[a](b.py), [c](../d.yaml), [e](f.ipynb)", "[a](b.py.md), [c](../d.yaml.md), [e](f.ipynb.md)"),
        ("[a](b.md#c), ![d](e.png)", "[a](b.md#c), ![d](e.png)"),
        ("# A\n\n[![CI](../../actions/a.svg)](../../actions/a) ![B](https://host/b)\n\nText", "# A\n\nText"),
        ("[a](https://host/b.py)", "[a](https://host/b.py)"),
        ("> checkpoint['a']['b']", "> checkpoint['a']\\['b']"),
    ],
)
def test_links_to_sources_lead_to_pages_that_show_them(pages: ModuleType, written: str, read: str):
    assert shown(pages, "tests/README.md", written) == read


def test_names_in_the_reference_lead_to_their_pages_and_options_do_not(pages: ModuleType):
    names = "| `merge(model)` | merges |\n| `LoRAError` | the error |\n"
    options = "| `r` | `8` | rank |\n| `init_lora_weights` | how they start |\n"
    found = shown(pages, "lightning_lora/README.md", names + options)
    assert found.startswith("| [`merge(model)`](../api/merge.md) | merges |\n| [`LoRAError`](../api/LoRAError.md) | ")
    assert found.endswith(options)
    assert shown(pages, "tests/README.md", names) == names


def test_links_that_lead_nowhere_are_named(pages: ModuleType, tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "index.html").write_text('<h1 id="here">a</h1><a href="../index.html#top">b</a>')
    right = ["inner/index.html", "inner/index.html#here", "inner/", "#top", "https://host/nowhere", "mailto:a@b"]
    wrong = ["gone.html", "inner/index.html#gone", "#gone", "inner/gone.png"]
    links = "".join(f'<a href="{target}">b</a>' for target in right + wrong[:3])
    (tmp_path / "index.html").write_text(f'<h1 id="top">a</h1>{links}<img src="{wrong[3]}">')
    (tmp_path / "404.html").write_text('<a href="/gone">of no fixed place</a>')
    assert list(pages.broken_links(tmp_path)) == [f"index.html: {target} leads nowhere" for target in wrong]
