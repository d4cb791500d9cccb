"""Check the files of a release before anyone installs them: python .ci/check_release.py FOLDER [--tag v1.2.3]."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_lora"
NOT_IN_SDIST = {".gitignore", ".pre-commit-config.yaml"}  # of a checkout alone; hatch adds .gitignore by itself


def tracked(root: Path = ROOT) -> set[str]:
    """List the files of the checkout that git knows."""
    run = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")) - {""}


def problems(wheel: Path, sdist: Path, files: set[str], root: Path = ROOT, tag: str = "") -> Iterator[str]:
    """Yield what is wrong with a wheel and an sdist that were built from the files of a checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        of_metadata = {name for name in names if ".dist-info/" in name}
        texts = {Path(name).name: archive.read(name).decode() for name in of_metadata}
    package = {name for name in files if name.startswith(f"{PACKAGE}/")}
    yield from differences("wheel", package, names - of_metadata)
    yield from (f"wheel: no {name}" for name in ("LICENSE", "entry_points.txt", "METADATA") if name not in texts)
    if f"{PACKAGE}/py.typed" not in names:
        yield "wheel: no py.typed"

    with tarfile.open(sdist) as archive_of_source:
        members = [member.name for member in archive_of_source.getmembers() if member.isfile()]
    in_sdist = {name.partition("/")[2] for name in members} - {"PKG-INFO"} - NOT_IN_SDIST
    yield from differences("sdist", files - NOT_IN_SDIST, in_sdist)

    metadata = Parser().parsestr(texts.get("METADATA", ""))
    yield from (
        f"METADATA pins {line!r}" for line in metadata.get_all("Requires-Dist", []) if "==" in line.split(";")[0]
    )
    yield from index_page_problems(metadata)
    yield from version_problems(str(metadata["Version"]), root, tag)


def differences(what: str, expected: set[str], found: set[str]) -> Iterator[str]:
    """Yield what an archive lacks, and what it should not hold."""
    yield from (f"{what}: lacks {name}" for name in sorted(expected - found))
    yield from (f"{what}: holds {name}, which is no part of it" for name in sorted(found - expected))


def index_page_problems(metadata: Message) -> Iterator[str]:
    """Yield what the page of a package index lacks: addresses, and links that lead out of it."""
    if not metadata.get_all("Project-URL"):
        yield "METADATA: no Project-URL; build with GITHUB_REPOSITORY=owner/name, as a workflow on GitHub does"
    targets = re.findall(r'(?:\]\(|src=")(?!https?://|#)([^)"\s]*)', str(metadata.get_payload()))
    if targets:
        yield f"METADATA: {len(targets)} links such as {targets[0]} lead nowhere on the page of a package index"


def version_problems(version: str, root: Path = ROOT, tag: str = "") -> Iterator[str]:
    """Yield where a version is said otherwise; of a tagged release the changelog and the citation have a date."""
    said = re.search(r'__version__ = "(.+)"', (root / PACKAGE / "__init__.py").read_text())
    if said is None or said[1] != version:
        yield f"{PACKAGE}.__version__ is {said and said[1]}, and the wheel is {version}"
    citation = (root / "CITATION.cff").read_text()
    if f"\nversion: {version}\n" not in citation:
        yield f"CITATION.cff does not say version {version}"
    changelog = (root / "CHANGELOG.md").read_text()
    if not re.search(rf"^#+ {re.escape(version)}\b", changelog, re.MULTILINE):
        yield f"CHANGELOG.md has no heading for {version}"
    if not tag:
        return
    if tag != f"v{version}":
        yield f"the tag is {tag}, and the version {version}"
    if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md says no date: its heading is to be '## {version} - YYYY-MM-DD', without 'Unreleased' above"
    if not re.search(r"^date-released: ", citation, re.MULTILINE):
        yield "CITATION.cff says no date-released"


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of a pattern in a folder."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} holds {len(found)} files {pattern}; expected one")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the wheel and the sdist are")
    parser.add_argument("--tag", default="", help="of the release; without it this is a rehearsal")
    given = parser.parse_args()
    found = list(problems(only(given.folder, "*.whl"), only(given.folder, "*.tar.gz"), tracked(), tag=given.tag))
    if found:
        sys.exit("\n".join(found))
    print("wheel and sdist hold what they should, and all say the same version")


if __name__ == "__main__":
    main()
