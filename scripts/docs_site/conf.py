"""Settings of Sphinx for the documentation's site: the pages of docs/, and what they link to, with the theme Furo.

The source folder is the repository, so that the links of the pages lead to the same places as at a Git host. The
navigation follows the links of docs/index.md, so that a new page is listed in one place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from outstation import __version__

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\(([^)\s#]+)\.md(?:#[^)]*)?\)")

project = "Outstation"
version = release = __version__
root_doc = "docs/index"
include_patterns = ["docs/**.md", "*.md", "models/**.md", "deploy/apt/README.md"]
exclude_patterns = [".*", "models/sources/*/*_CARD.md", "build", "dist", "**/node_modules"]
extensions = ["myst_parser"]
# A page that no list names, such as a README, is reached by links; tests/project/test_docs_site.py follows them.
# Blocks of TOML and JSON with an ellipsis do not parse.
suppress_warnings = ["toc.not_included", "misc.highlighting_failure"]
highlight_language = "none"
smartquotes = False
myst_heading_anchors = 4

html_theme = "furo"
html_title = "Outstation"
html_additional_pages = {"index": "landing.html"}
templates_path = ["."]
_PICTURES = [f"../../docs/images/dashboard-fleet-{kind}.png" for kind in ("light", "dark", "phone")]
html_static_path = ["style.css", *_PICTURES]
html_css_files = ["style.css"]
_SCROLLING = [f"sidebar/{part}.html" for part in ("search", "scroll-start", "navigation", "scroll-end")]
html_sidebars = {"**": ["brand.html", *_SCROLLING]}
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_use_index = False
html_permalinks_icon = "#"
pygments_style = "default"
pygments_dark_style = "github-dark"
_BLUE, _LIGHT_BLUE = "#0a58ca", "#7db4ff"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": _BLUE, "color-brand-content": _BLUE, "color-brand-visited": _BLUE},
    "dark_css_variables": {
        "color-brand-primary": _LIGHT_BLUE,
        "color-brand-content": _LIGHT_BLUE,
        "color-brand-visited": _LIGHT_BLUE,
    },
}


def list_pages(document: str) -> str:
    """Return a page's part of the navigation, from its links: hidden lists of Sphinx.

    The index lists all pages that it links to, under its headings; another page those of the folder that it introduces.
    """
    path = ROOT / f"{document}.md"
    folder = "" if document == root_doc else f"{document.removesuffix('/README')}/"
    lists, listed = [], set[str]()
    for section in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        caption, _, text = section.partition("\n")
        pages = [(path.parent / link).resolve().relative_to(ROOT).as_posix() for link in _LINK.findall(text)]
        # The README is the first page at a Git host; here it is linked only.
        new = [page for page in dict.fromkeys(pages) if page.startswith(folder) and page not in {*listed, "README"}]
        listed.update(new)
        heading = f":caption: {caption}" if document == root_doc else ":titlesonly:"
        if new:
            lists.append("\n".join(["```{toctree}", ":hidden:", heading, "", *(f"/{page}" for page in new), "```"]))
    return "\n\n".join(lists)


def add_navigation(_: object, document: str, source: list[str]) -> None:
    if document == root_doc or document.endswith("/README") or (ROOT / document).is_dir():
        source[0] += "\n\n" + list_pages(document)


def setup(app: Any) -> None:
    app.connect("source-read", add_navigation)
