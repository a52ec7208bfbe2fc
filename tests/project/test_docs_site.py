"""Site of the documentation: complete, every link leads somewhere, and nothing comes from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from outstation.foundation.render.html import SCROLL_ATTRIBUTES, SCROLL_SHADOWS
from scripts import docs_site
from scripts.docs_site import Page

# What a browser loads by itself.
_LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}


class _Links(HTMLParser):
    """Targets that a browser loads, targets that a reader follows, and anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.followed: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if (tag, name) in _LOADED:
                self.loaded.append(value or "")
            elif name == "href":
                self.followed.append(value or "")
            elif name == "id":
                self.anchors.add(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Page]]:
    out = tmp_path_factory.mktemp("site")
    return out, docs_site.build(out)


def test_every_table_scrolls_by_itself_and_shows_that_it_does(site: tuple[Path, list[Page]]) -> None:
    out, pages = site
    tables = 0
    for page in pages:
        text = (out / page.url).read_text(encoding="utf-8")
        tables += text.count("<table>")
        assert text.count("<table>") == text.count(f"<div {SCROLL_ATTRIBUTES}><table>"), page.url
    assert tables > 50
    assert f".scroll, pre {{ {SCROLL_SHADOWS} }}" in (out / "style.css").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_elsewhere_and_every_link_leads_somewhere(site: tuple[Path, list[Page]]) -> None:
    out, _ = site
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in out.rglob("*.html")}
    problems = []
    for path, links in pages.items():
        problems += [f"{path}: loads {target}" for target in links.loaded if not (path.parent / target).is_file()]
        for target in links.followed:
            name, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            other = (path.parent / name).resolve() if name else path
            if not other.is_file() or (anchor and other in pages and anchor not in pages[other].anchors):
                problems.append(f"{path}: {target}")
    assert problems == []
    for file in (*out.rglob("*.css"), *out.rglob("*.svg")):
        assert not re.search(r"@import|url\(|(?:href|src)=[\"'](?!#)", file.read_text(encoding="utf-8")), file
    assert not re.search(r"fetch\(|import\(|XMLHttpRequest", docs_site._SEARCH)


def test_every_page_is_reached_from_the_first_one(site: tuple[Path, list[Page]]) -> None:
    _, pages = site
    by_path = {page.path: page for page in pages}
    waiting, reached = [Path("docs/index.md")], set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in reached and path in by_path:
            reached.add(path)
            waiting += by_path[path].links
    assert {path.as_posix() for path in by_path.keys() - reached} == set()


def test_the_navigation_has_the_order_of_the_index_and_no_title_twice(site: tuple[Path, list[Page]]) -> None:
    out, pages = site
    html = (out / "docs" / "index.html").read_text(encoding="utf-8")
    start = html.partition("<h2>START</h2>")[2].partition("</ul>")[0]
    assert re.findall(r"start/([\w-]+)\.html", start) == [
        "demo",
        "first-pi",
        "first-fleet",
        "own-model",
    ]
    titles = [page.title for page in pages]
    assert sorted({title for title in titles if titles.count(title) > 1}) == []
    text = next(page.text for page in pages if page.path == Path("docs/start/first-pi.md"))
    assert "reports drift. A drift window has" in text
