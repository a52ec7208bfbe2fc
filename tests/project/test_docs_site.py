"""Site of the documentation: complete, searchable, readable on a phone; nothing in it comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.kit import browsers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PHONE, LAPTOP = (390, 844), (1280, 900)
# What a browser loads by itself.
_LOADED = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("source", "srcset"),
}
# Pages with wide tables or long lines.
_LARGE = (
    "docs/reference/config",
    "docs/reference/fleet-database",
    "docs/reference/alerts",
    "docs/internals/architecture",
)


class _Links(HTMLParser):
    """Targets that a browser loads, targets that a reader follows, and anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.followed: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        relation = dict(attrs).get("rel")
        for name, value in attrs:
            if (tag, name) in _LOADED and relation not in ("next", "prev", "search", "index"):
                self.loaded.append(value or "")
            elif name == "href" and tag == "a":
                self.followed.append(unquote(value or ""))
            elif name == "id":
                self.anchors.add(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "scripts" / "docs_site")]
    command += ["-d", str(folder / "doctrees"), str(ROOT), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "out"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Links]:
    return {path: _Links(path) for path in site.rglob("*.html")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from browsers.launched()


def _opened(browser: Any, page: Path, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """Return a page in the browser, and the addresses that it requests from other places than the site's folder."""
    tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
    foreign: list[str] = []
    tab.on("request", lambda request: foreign.append(request.url) if not request.url.startswith("file://") else None)
    tab.goto(page.as_uri())
    return tab, foreign


def test_every_link_leads_to_a_file_and_a_heading_and_the_site_loads_its_own_files_only(
    site: Path, pages: dict[Path, _Links]
) -> None:
    problems = []
    for path, links in pages.items():
        for target in links.loaded:
            if not (path.parent / target.partition("?")[0]).is_file():
                problems.append(f"{path}: loads {target}")
        for target in links.followed:
            name, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            other = (path.parent / name).resolve() if name else path
            if not other.is_file() or (anchor and other in pages and anchor not in pages[other].anchors):
                problems.append(f"{path}: {target}")
    assert problems == []
    for file in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file


def test_every_page_of_docs_is_reached_from_the_first_page(site: Path, pages: dict[Path, _Links]) -> None:
    waiting, reached = [site / "index.html"], set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in reached and path in pages:
            reached.add(path)
            names = (target.partition("#")[0] for target in pages[path].followed if not re.match(r"[a-z]+:", target))
            waiting += [(path.parent / name).resolve() for name in names if name]
    documents = {site / path.relative_to(ROOT).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert len(documents) > 80
    assert documents - reached == set()


def test_the_navigation_has_the_order_of_the_index_and_no_title_twice(site: Path, pages: dict[Path, _Links]) -> None:
    html = (site / "docs" / "index.html").read_text(encoding="utf-8")
    start = html.partition('<span class="caption-text">Start</span>')[2].partition("</ul>")[0]
    assert re.findall(r'href="(?:start|guides)/([\w-]+)\.html"', start) == [
        "demo", "first-pi", "first-fleet", "own-model", "testing",
    ]  # fmt: skip
    titles = [re.findall(r"<title>(.*?)</title>", path.read_text(encoding="utf-8"))[0] for path in pages]
    assert sorted({title for title in titles if titles.count(title) > 1}) == []


def test_a_search_finds_the_page_and_nothing_is_requested_from_elsewhere(site: Path, browser: Any) -> None:
    tab, foreign = _opened(browser, site / "index.html", LAPTOP)
    tab.fill(".sidebar-search", "share_group")
    tab.press(".sidebar-search", "Enter")
    tab.wait_for_selector("ul.search li a")
    titles = tab.eval_on_selector_all("ul.search li a", "links => links.map(link => link.textContent)")
    assert "Run a collector" in titles
    tab.click("ul.search li a")
    tab.wait_for_selector("article h1")
    tab.close()
    assert foreign == []


@pytest.mark.parametrize("size", [PHONE, LAPTOP])
@pytest.mark.parametrize("page", ["index", "docs/index", *_LARGE])
def test_a_page_does_not_scroll_sideways_and_keys_of_its_tables_stay_whole(
    site: Path, browser: Any, page: str, size: tuple[int, int]
) -> None:
    tab, foreign = _opened(browser, site / f"{page}.html", size)
    assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
    broken = """codes => codes.filter(code => code.getClientRects().length > 1).map(code => code.textContent)"""
    assert tab.eval_on_selector_all("td:first-child code", broken) == []
    tab.close()
    assert foreign == []


def test_a_laptop_shows_the_contents_of_a_page_and_a_reader_chooses_dark(site: Path, browser: Any) -> None:
    tab, _ = _opened(browser, site / "docs" / "guides" / "collector.html", LAPTOP)
    assert tab.is_visible(".toc-tree >> text=Quotas")
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        seen.add(tab.evaluate(colour))
    tab.close()
    assert len(seen) == 2
