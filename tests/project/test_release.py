"""The check of a release, and files of the project that only GitHub reads."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lightning_lora

ROOT = Path(__file__).parents[2]
METADATA = """Metadata-Version: 2.4
Name: lightning-lora
Version: 1.2.0
Project-URL: Source, https://host/owner/name
Requires-Dist: torch>=2.6
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check() -> ModuleType:
    return load("check_release")


class Release:
    """A small project, and the wheel and the sdist that are made of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {
            "lightning_lora/__init__.py": '__version__ = "1.2.0"\n',
            "lightning_lora/py.typed": "",
            "tests/test_all.py": "",
            "CHANGELOG.md": "## 1.2.0 - 2026-01-31\n",
            "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.0\ndate-released: 2026-01-31\n",
            ".gitignore": "",
        }
        self.wheel = {name: text for name, text in self.files.items() if name.startswith("lightning_lora/")}
        folder = "lightning_lora-1.2.0.dist-info"
        self.wheel |= {
            f"{folder}/licenses/LICENSE": "",
            f"{folder}/entry_points.txt": "",
            f"{folder}/METADATA": METADATA,
        }
        self.sdist = {name: text for name, text in self.files.items() if name != ".gitignore"} | {"PKG-INFO": METADATA}

    def problems(self, check: ModuleType, tag: str = "") -> list[str]:
        for name, text in self.files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        with zipfile.ZipFile(self.root / "a.whl", "w") as wheel:
            for name, text in self.wheel.items():
                wheel.writestr(name, text)
        with tarfile.open(self.root / "a.tar.gz", "w:gz") as sdist:
            for name, text in self.sdist.items():
                entry = tarfile.TarInfo(f"lightning_lora-1.2.0/{name}")
                entry.size = len(text)
                sdist.addfile(entry, io.BytesIO(text.encode()))
        archives = self.root / "a.whl", self.root / "a.tar.gz"
        return list(check.problems(*archives, set(self.files), self.root, tag))


IN_WHEEL = "lightning_lora-1.2.0.dist-info"


@pytest.mark.parametrize(
    ("archive", "name", "text", "said"),
    [
        ("wheel", "lightning_lora/py.typed", None, ["wheel: lacks lightning_lora/py.typed", "wheel: no py.typed"]),
        ("wheel", f"{IN_WHEEL}/licenses/LICENSE", None, ["wheel: no LICENSE"]),
        ("wheel", f"{IN_WHEEL}/entry_points.txt", None, ["wheel: no entry_points.txt"]),
        ("sdist", "tests/test_all.py", None, ["sdist: lacks tests/test_all.py"]),
        ("sdist", "tests/secret.pt", "", ["sdist: holds tests/secret.pt, which is no part of it"]),
        ("wheel", f"{IN_WHEEL}/METADATA", METADATA.replace(">=2.6", "==2.6; python_version > '3'"), ["torch==2.6"]),
        ("wheel", f"{IN_WHEEL}/METADATA", METADATA + "Requires-Dist: mypy; extra == 'test'\n", []),
        ("wheel", f"{IN_WHEEL}/METADATA", METADATA.replace("Project-URL", "Home-page"), ["METADATA: no Project-URL"]),
        ("wheel", f"{IN_WHEEL}/METADATA", METADATA + "\n[a](b.md) ![c](d.png)\n", ["METADATA: 2 links such as b.md"]),
        (
            "wheel",
            f"{IN_WHEEL}/METADATA",
            METADATA + '\n<img src="tests/d.png">\n',
            ["METADATA: 1 links such as"],
        ),
        ("wheel", f"{IN_WHEEL}/METADATA", METADATA + "\n[a](https://host/b.md), [c](#d)\n", []),
        ("files", "lightning_lora/__init__.py", '__version__ = "1.3.0"\n', ["lightning_lora.__version__ is 1.3.0"]),
        ("files", "CHANGELOG.md", "## 1.20.0 - 2026-01-31\n", ["CHANGELOG.md has no heading"]),
        ("files", "CITATION.cff", "cff-version: 1.2.0\nversion: 1.1.0\n", ["does not say version 1.2.0"]),
    ],
)
def test_what_is_wrong_with_a_release_is_named(
    tmp_path: Path, check: ModuleType, archive: str, name: str, text: str | None, said: list[str]
):
    release = Release(tmp_path)
    assert release.problems(check, tag="v1.2.0") == []
    if text is None:
        del getattr(release, archive)[name]
    else:
        getattr(release, archive)[name] = text
    found = release.problems(check)
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("tag", "file", "text", "said"),
    [
        ("v1.3.0", "CHANGELOG.md", "## 1.2.0 - 2026-01-31\n", "the tag is v1.3.0, and the version 1.2.0"),
        ("v1.2.0", "CHANGELOG.md", "## Unreleased\n\n### 1.2.0\n", "CHANGELOG.md says no date"),
        ("v1.2.0", "CITATION.cff", "cff\nversion: 1.2.0\n", "says no date-released"),
    ],
)
def test_tagged_release_needs_tag_and_dates(tmp_path: Path, check: ModuleType, tag, file: str, text: str, said: str):
    release = Release(tmp_path)
    release.files[file] = text
    assert [problem for problem in release.problems(check, tag) if said in problem]
    assert not [problem for problem in release.problems(check) if said in problem]


@pytest.fixture
def index_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook of the build, whose base class is in a build's environment alone."""
    interface = ModuleType("interface")
    interface.MetadataHookInterface = type("MetadataHookInterface", (), {})
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    return load("index_page")


def test_index_page_of_a_release_has_addresses_of_its_tag_and_its_own_way_to_install(
    check: ModuleType, index_page: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    hook = index_page.IndexPage()
    hook.root = str(ROOT)
    monkeypatch.setenv("GITHUB_REPOSITORY", "somebody/name")
    metadata = {"version": "1.2.0"}
    hook.update(metadata)
    text = metadata["readme"]["text"]
    assert "`pip install lightning-lora`" in text
    assert index_page.for_index('`pip install ".[cli]"`', "", "") == '`pip install "lightning-lora[cli]"`'
    assert '\npip install -e ".[test]" && pytest\n' in text  # in a checkout
    assert "not on PyPI" not in text
    at = "https://github.com/somebody/name"
    assert f"]({at}/blob/v1.2.0/lightning_lora/nn/variants.md)" in text
    assert f"]({at}/blob/v1.2.0/tests/benchmarks/README.md#peft-inside-a-lightningmodule)" in text
    picture = index_page.for_index('<img src="tests/a.png">', at, "v1.2.0")
    assert picture == f'<img src="{at}/raw/v1.2.0/tests/a.png">'
    assert text.count(f"({at}/actions/workflows/ci.yml") == 2
    assert metadata["urls"]["Source"] == at
    whole = Message()
    whole["Project-URL"] = at
    whole.set_payload(text)
    assert list(check.index_page_problems(whole)) == []


def test_index_page_of_a_build_elsewhere_is_the_front_page_and_that_of_an_sdist_stays(
    index_page: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    hook = index_page.IndexPage()
    hook.root = str(ROOT)
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    metadata = {"version": "1.2.0"}
    hook.update(metadata)
    assert metadata.keys() == {"version", "readme"}
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()
    written = {"version": "1.2.0", "readme": {"text": "of the sdist"}, "urls": {"Source": "https://host"}}
    hook.update(found := dict(written))
    assert found == written


def test_this_project_says_one_version_everywhere(check: ModuleType):
    assert list(check.version_problems(lightning_lora.__version__)) == []


def test_workflows_run_the_projects_own_checks_on_every_python_that_pyproject_names():
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["everything"]
    classifiers = (ROOT / "pyproject.toml").read_text()
    versions = ci["strategy"]["matrix"]["python"]
    assert [version for version in versions if f"Python :: {version}" not in classifiers] == []
    assert classifiers.count("Python :: 3.") == len(versions)
    assert ".ci/run" in [step.get("run") for step in ci["steps"]]
    release = (ROOT / ".github/workflows/release.yml").read_text()
    assert 'python .ci/check_release.py dist --tag "$GITHUB_REF_NAME"' in release
    assert "python -m build && twine check --strict dist/*" in release
    site = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())["jobs"]["build"]
    (build,) = [step["run"] for step in site["steps"] if "run" in step]
    assert f"run '{build}'\n" in (ROOT / ".ci/run").read_text()


def test_hooks_before_a_commit_are_the_commands_of_the_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / ".ci/run").read_text()
    for hook in hooks:
        assert f"run '{hook['entry'].removesuffix(' --fix')}" in script


# --- SECURITY.md ---

SECURITY = ROOT / ".github" / "SECURITY.md"


def section(heading: str) -> str:
    """What stands below a heading of SECURITY.md, in one line."""
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", SECURITY.read_text(), re.MULTILINE | re.DOTALL)
    return " ".join(found.split())


def test_the_security_page_promises_every_door_and_names_the_checks():
    promised = section("What is promised")
    doors = ["load_adapter", "load_from_checkpoint", "ckpt_path"]
    assert [door for door in doors if f"`{door}`" not in promised] == []
    assert all(hasattr(lightning_lora, door) for door in doors[:2])
    (link,) = re.findall(r"\[checked\]\((.*?)#safety\)", promised)
    assert "## Safety" in (SECURITY.parent / link).read_text()


def test_extras_for_users_leave_out_what_the_tests_need():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\](?: *#[^\n]*)?$", section, re.MULTILINE | re.DOTALL))
    needed, following = set(), ["cli", "plot", "examples", "deepspeed", "quantized", "ray"]
    while following:
        needed.add(name := following.pop())
        for names in re.findall(r'"lightning-lora\[(.*?)\]"', extras[name]):
            following += [name for name in names.split(",") if name not in needed]
    assert not needed & {"test", "dev", "bench", "packages"}


def test_no_file_holds_a_mark_of_an_unfinished_merge():
    folders = (ROOT / name for name in ("lightning_lora", "tests", "examples", ".ci", ".github"))
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*.*"))]
    texts = {
        file: file.read_text() for file in files if file.suffix in (".md", ".py", ".toml", ".yaml", ".yml", ".txt")
    }
    marked = [file.name for file, text in texts.items() if re.search("^(<{7}|>{7}) ", text, re.MULTILINE)]
    assert len(texts) > 400
    assert not marked
