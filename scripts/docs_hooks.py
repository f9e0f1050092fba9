"""Hooks of mkdocs: pages from outside of docs/, and links to files of the repository that work in the site as well.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. A page links to other files of the repository by relative
path, as a reader of a checkout needs it; in the site such a link leads to a copy of the file as plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages, and a copy of each file of the repository that a page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked = {
        in_repository(file.src_uri, target)
        for file in files.documentation_pages()
        for target in LINK.findall(file.content_string)
    }
    for path in sorted(linked):
        if not path.startswith("docs/") and path not in PAGES and (ROOT / path).is_file():
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page from paths in the repository into paths in the site."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = in_site(in_repository(here, link[1]))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"

    return LINK.sub(moved, markdown)


def in_repository(page: str, link: str) -> str:
    """Return the path in the repository of a link on a page, whose path is the site's."""
    sources = {made: source for source, made in PAGES.items()}
    folder = posixpath.dirname(sources.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def in_site(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"repository/{path}.txt")
