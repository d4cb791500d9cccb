"""The package index's page: README.md and addresses of the project, when hatchling builds a release.

The project's address is that of the repository whose workflow builds the release, as GitHub Actions says it in
GITHUB_REPOSITORY. A build elsewhere knows no address: then links stay as they are in the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s]+)")
PICTURE = re.compile(r'(!\[[^\]]*\]\(|src=")(?!https?:)([^)"\s]+)')
INSTALL = re.compile(r'\bpip install (?:\.(?= |`|$)|"\.(?=\[))', re.MULTILINE)
NOT_YET = " (it is not on PyPI yet)"
ON_GITHUB = "../../"  # beside the files of a branch


class IndexPage(MetadataHookInterface):
    """Fill in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text()
        repository = os.environ.get("GITHUB_REPOSITORY")
        if repository:
            address = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}"
            text = for_index(text, address, f"v{metadata['version']}")
            metadata["urls"] = addresses(address, f"v{metadata['version']}")
        metadata.setdefault("readme", {"content-type": "text/markdown", "text": text})


def addresses(address: str, tag: str) -> dict[str, str]:
    """Return the links that a package index shows beside the page."""
    return {
        "Source": address,
        "Documentation": f"{address}/blob/{tag}/lightning_lora/README.md",
        "Changes": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def for_index(text: str, address: str, tag: str) -> str:
    """Return the front page with the addresses of a release in its links, and with the index's way to install it."""

    def whole(match: re.Match[str], view: str) -> str:
        before, path = match.groups()
        if path.startswith(ON_GITHUB):
            return f"{before}{address}/{path.removeprefix(ON_GITHUB)}"
        return f"{before}{address}/{view}/{tag}/{path}"

    text = text.replace(NOT_YET, "")
    text = PICTURE.sub(lambda match: whole(match, "raw"), text)
    text = LINK.sub(lambda match: whole(match, "blob"), text)
    return INSTALL.sub(lambda match: match[0].replace(".", "lightning-lora"), text)
