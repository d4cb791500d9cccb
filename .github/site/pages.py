"""Give mkdocs the pages where they are in the repository and a page for each public name; check every link."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.pages")  # a warning there ends mkdocs build --strict

ROOT = Path(__file__).parents[2]
FOLDERS = {".": "*.md", ".github": "*.md", "lightning_lora": "**/*.md", "examples": "*.md", "tests": "**/*.md"}
NO_PAGES = {".github/PULL_REQUEST_TEMPLATE.md"}
LINK = re.compile(r'(\]\(|(?:src|srcset)=")(?!https?:)([^)#"\s]+)')
LANGUAGES = {".py": "python", ".ipynb": "python", ".yaml": "yaml", ".yml": "yaml", ".cff": "yaml"}
BADGES = re.compile(r"^\[!\[.*\n\n", re.MULTILINE)  # pictures from elsewhere
QUOTE = re.compile(r"^>.*", re.MULTILINE)
NAME = re.compile(r"^\| `(\w+)(\(.*?\))?` \| (?!`)", re.MULTILINE)  # a row of the table of names


def repository_pages() -> Iterator[str]:
    """Yield the Markdown files of the repository, relative to its root."""
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name not in NO_PAGES:
                yield name


def public_names() -> list[str]:
    """Read the public names out of the package, without importing it."""
    body = ast.parse((ROOT / "lightning_lora" / "__init__.py").read_text()).body
    found = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return sorted([*ast.literal_eval(found[0]), "LoRACLI"], key=str.lower)


def linked_files(name: str) -> Iterator[str]:
    """Yield the files that a page links or shows and that are no pages, relative to the root."""
    for _, target in LINK.findall((ROOT / name).read_text()):
        path = os.path.normpath(os.path.join(os.path.dirname(name), target))
        if not path.endswith(".md") and (ROOT / path).is_file():
            yield path


def source_page(path: Path) -> str:
    """Return the Markdown of the page that shows a source, or a notebook with a link to its file."""
    language = LANGUAGES[path.suffix]
    if path.suffix != ".ipynb":
        return f"# {path.name}\n\n```{language}\n{path.read_text()}```\n"
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        code = f"```{language}\n{source}\n```"
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            code = f'<details markdown="1"><summary>{source.splitlines()[0]}</summary>\n\n{code}\n\n</details>'
        parts.append(source if cell["cell_type"] == "markdown" else code)
    parts.insert(1, f'<a href="{path.name}" download>Download {path.name}</a>')
    return "\n\n".join(parts) + "\n"


def add(files: Files, config: MkDocsConfig, name: str, text: str | None = None, in_nav: bool = True) -> None:
    """Add a file of the repository, or a page with a text; the site has no folder that begins with a dot."""
    from mkdocs.structure.files import File, InclusionLevel  # what needs no mkdocs is tested without it

    suffix = ".html" if name.endswith(".md") else Path(name).suffix
    dest = str(Path(name).with_suffix(suffix)).lstrip(".") if name.startswith(".") else None
    inclusion = InclusionLevel.INCLUDED if in_nav else InclusionLevel.NOT_IN_NAV
    source = str(ROOT) if text is None else None
    file = File(name, source, config.site_dir, config.use_directory_urls, dest_uri=dest, inclusion=inclusion)
    if text is not None:
        file.content_string = text
    files.append(file)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the public names to the navigation."""
    at = [next(iter(entry)) for entry in config.nav].index("Reference") + 1
    config.nav.insert(at, {"API": [{name: f"api/{name}.md"} for name in public_names()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, the sources and pictures that they link, and the page of each public name."""
    pages = list(repository_pages())
    for name in pages:
        add(files, config, name)
    for name in sorted({linked for page in pages for linked in linked_files(page)}):
        suffix = Path(name).suffix
        if suffix in LANGUAGES:
            add(files, config, f"{name}.md", source_page(ROOT / name), in_nav=False)
        if suffix not in LANGUAGES or suffix == ".ipynb":
            add(files, config, name)
    for name in public_names():
        add(files, config, f"api/{name}.md", f"::: lightning_lora.{name}\n")
    return files


def with_nested_lists(markdown: str) -> str:
    """Indent lists in lists by four spaces and set lists apart from the text above, as mkdocs and not GitHub asks."""
    lines: list[str] = []
    fenced = above_is_item = in_list = False
    indent_above = 0
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip())
        is_item = not fenced and re.match(r" *([-*]|\d+\.) ", line) is not None
        after_text = not in_list or (not above_is_item and indent == indent_above)
        if is_item and after_text and lines and lines[-1].strip():
            lines.append("")
        lines.append(line if fenced else " " * (indent // 2 * 4) + line.lstrip())
        fenced ^= line.lstrip().startswith("```")
        in_list = bool(line.strip()) and (in_list or is_item)
        above_is_item, indent_above = is_item, indent
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to sources lead to their pages, and names in the table of names to theirs."""

    def to_page(link: re.Match[str]) -> str:
        return link[0] + ".md" if Path(link[2]).suffix in LANGUAGES else link[0]

    def to_name(row: re.Match[str]) -> str:
        return f"| [`{row[1]}{row[2] or ''}`](../api/{row[1]}.md) | " if row[1] in names else row[0]

    names = public_names()
    markdown = BADGES.sub("", markdown)
    markdown = LINK.sub(to_page, with_nested_lists(markdown))
    markdown = QUOTE.sub(lambda line: line[0].replace("][", "]\\["), markdown)  # no link, but an index of an index
    if page.file.src_uri == "README.md":  # alone under its tab
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri == "lightning_lora/README.md":
        markdown = NAME.sub(to_name, markdown)
    return markdown


# --- the links of the built site ---


class Links(HTMLParser):
    """The targets of a built page, and the places in it that a link may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.places.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


def broken_links(site: Path) -> Iterator[str]:
    """Yield the dead links of a site: their file, or the place in it, does not exist."""
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            place = unquote(parts.fragment)
            if not path.is_file() or (place and path in pages and place not in pages[path].places):
                yield f"{page.relative_to(site)}: {target} leads nowhere"


def on_post_build(config: MkDocsConfig) -> None:
    """Name every link that leads nowhere, and every public name whose example is not shown as one."""
    site = Path(config.site_dir)
    for problem in broken_links(site):
        log.warning(problem)
    for path in sorted((site / "api").glob("*.html")):
        if "Examples:" not in path.read_text():
            log.warning(f"{path.name}: shows no example; docstrings.py finds Example:: in a docstring")
