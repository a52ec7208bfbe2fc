"""Site of the documentation: pages of docs/ and what they link to as HTML that loads nothing from elsewhere.

    python -m scripts.docs_site [FOLDER]     the default is build/site

Pages keep their paths, so that links between them stay; files that they link to are copied.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from outstation.foundation.render.html import SCROLL_ATTRIBUTES, SCROLL_SHADOWS
from scripts.kit.usage import answer_help

ROOT = Path(__file__).parents[1]
INDEX = Path("docs/index.md")
DEFAULT = ROOT / "build" / "site"
# Order of the navigation.
FOLDERS = ("start", "guides", "concepts", "reference", "internals")
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//")
_REDIRECT = """\
<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">
<title>Outstation</title><a href="docs/index.html">Outstation</a>
"""
_STYLE = """
:root {
  color-scheme: light dark; --line: #8884; --link: light-dark(#0a58ca, #7db4ff);
  --paper: Canvas; --reference-edge: light-dark(#888a, #aaac);
}
* { box-sizing: border-box }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; display: grid; grid-template-columns: 17rem minmax(0, 1fr) }
nav { padding: 1rem; border-right: 1px solid var(--line); position: sticky; top: 0; height: 100vh; overflow: auto }
nav ul { list-style: none; padding: 0; margin: 0 0 1rem } nav h2 { font-size: .8rem; margin: 0 }
nav [aria-current] { font-weight: 700 } nav input { width: 100%; font: inherit; padding: .3rem }
#found small { display: block; opacity: .75; overflow-wrap: anywhere }
main { padding: 1rem 2rem 4rem; max-width: 60rem } a { color: var(--link) }
pre { padding: .75rem; overflow: auto }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere }
pre code { overflow-wrap: normal }
table { border-collapse: collapse } .scroll { overflow-x: auto; margin: 1em 0 } .scroll, pre { SCROLL_SHADOWS }
pre { --paper: color-mix(in srgb, Canvas 93%, #888); background-color: var(--paper) }
img { max-width: 100%; background: #fff }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top }
summary { font-weight: 700; padding: .4rem 0 }
@media (min-width: 50.01rem) { summary { display: none } }
@media (max-width: 50rem) {
  body { display: block } nav { position: static; height: auto; border: 0; border-bottom: 1px solid var(--line) }
  nav ul { margin: 0 } main { padding: 1rem } table { font-size: .85rem }
  th, td { padding: .2rem .35rem; min-width: 4.5rem } td:first-child { min-width: 6rem }
}
"""
_SEARCH = """
const box = document.querySelector('#search'), list = document.querySelector('#found');
box.addEventListener('input', () => {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  list.replaceChildren();
  if (!words.length) return;
  const hits = PAGES.map(([url, title, text]) => {
    const low = (title + ' ' + text).toLowerCase();
    if (!words.every(word => low.includes(word))) return null;
    const at = Math.max(0, text.toLowerCase().indexOf(words[0]));
    const from = at < 50 ? 0 : text.indexOf(' ', at - 50) + 1;
    const excerpt = (from ? '… ' : '') + text.slice(from, at + 70) + (text.length > at + 70 ? ' …' : '');
    return [words.filter(word => title.toLowerCase().includes(word)).length, url, title, excerpt];
  }).filter(Boolean).sort((a, b) => b[0] - a[0]).slice(0, 12);
  for (const [, url, title, excerpt] of hits) {
    const link = document.createElement('a'), item = document.createElement('li');
    const around = document.createElement('small');
    link.href = TOP + url; link.textContent = title; around.textContent = excerpt;
    item.append(link, around); list.append(item);
  }
});
"""


class Page:
    """One Markdown page: `path` relative to the repository, its title, its HTML, and the text for the search."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = (ROOT / path).read_text(encoding="utf-8")
        parser = MarkdownIt("commonmark", {"html": False}).enable("table")
        tokens = parser.parse(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
        # In the order of the page.
        self.links: dict[Path, None] = {}
        for at, token in enumerate(tokens):
            if token.type == "heading_open":
                token.attrs["id"] = _anchor(tokens[at + 1].content)
            for child in token.children or ():
                self._localize(child)
        self.title = next(
            (tokens[at + 1].content for at, t in enumerate(tokens) if t.type == "heading_open"), path.stem
        )
        parser.add_render_rule("table_open", lambda *_: f"<div {SCROLL_ATTRIBUTES}><table>")
        parser.add_render_rule("table_close", lambda *_: "</table></div>")
        self.html = parser.renderer.render(tokens, parser.options, {})
        # Without the marks of links and emphasis, since the search shows parts of it.
        blocks = (token for token in tokens if token.type in ("inline", "fence"))
        parts = ("".join(map(_read_text, token.children or (token,))) for token in blocks)
        self.text = " ".join(" ".join(parts).split())

    @property
    def url(self) -> str:
        return self.path.with_suffix(".html").as_posix()

    def _localize(self, token: Token) -> None:
        """Record what a link or image names, and let links to pages name their HTML."""
        name = {"link_open": "href", "image": "src"}.get(token.type)
        target = str(token.attrs.get(name, "")) if name else ""
        if not name or not target or _EXTERNAL.match(target) or target.startswith("#"):
            return
        path, mark, anchor = target.partition("#")
        place = (ROOT / self.path).parent / path
        resolved = place.resolve().relative_to(ROOT)
        if (ROOT / resolved).is_dir():
            resolved, path = resolved / "README.md", f"{path.rstrip('/')}/README.md"
        self.links[resolved] = None
        token.attrs[name] = re.sub(r"\.md$", ".html", path) + mark + anchor


def build(out: Path) -> list[Page]:
    """Write the site into a folder, whose content it replaces, and return its pages."""
    shutil.rmtree(out, ignore_errors=True)
    waiting, known = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")], dict[Path, Page]()
    files: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in known:
            known[path] = page = Page(path)
            waiting += [link for link in page.links if link.suffix == ".md"]
            files |= {link for link in page.links if link.suffix != ".md"}
    # In the order of the index; what it does not name comes last.
    listed = [INDEX, *known[INDEX].links]
    order = {path: listed.index(path) if path in listed else len(listed) for path in known}
    pages = [known[path] for path in sorted(known, key=lambda path: (order[path], path))]
    for page in pages:
        target = out / page.url
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_render(page, pages), encoding="utf-8")
    for file in sorted(files):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, out / file)
    index = json.dumps([[page.url, page.title, page.text] for page in pages])
    (out / "search.js").write_text(f"const PAGES = {index};\n{_SEARCH}", encoding="utf-8")
    (out / "style.css").write_text(_STYLE.replace("SCROLL_SHADOWS", SCROLL_SHADOWS), encoding="utf-8")
    (out / "index.html").write_text(_REDIRECT, encoding="utf-8")
    return pages


def _render(page: Page, pages: list[Page]) -> str:
    top = "../" * (len(page.path.parts) - 1)
    groups = []
    for folder in ("docs", *(f"docs/{name}" for name in FOLDERS)):
        items = ""
        for other in (other for other in pages if other.path.parent.as_posix() == folder):
            mark = " aria-current=page" if other is page else ""
            items += f'<li><a href="{top}{other.url}"{mark}>{escape(other.title)}</a></li>'
        heading = "" if folder == "docs" else f"<h2>{folder.removeprefix('docs/').upper()}</h2>"
        groups.append(f"{heading}<ul>{items}</ul>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(page.title)} – Outstation</title><link rel="stylesheet" href="{top}style.css">'
        f'<nav><input id="search" type="search" placeholder="Search" aria-label="Search"><ul id="found"></ul>'
        # On a phone, the list of all pages would stand before each page.
        f"<details open><summary>Pages</summary>{''.join(groups)}</details></nav>"
        "<script>document.querySelector('details').open = !matchMedia('(max-width: 50rem)').matches</script>"
        f"<main>{page.html}</main>"
        f'<script>const TOP = "{top}"</script><script src="{top}search.js"></script></html>\n'
    )


def _read_text(token: Token) -> str:
    return {"softbreak": " ", "hardbreak": " ", "image": ""}.get(token.type, token.content)


def _anchor(title: str) -> str:
    """Return the anchor that Git hosts assign to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if out.exists() and not (out / "search.js").exists():
        sys.exit(f"docs_site: {out} exists and is no site; name a new folder")
    pages = build(out)
    print(f"{out}/index.html: {len(pages)} pages")


if __name__ == "__main__":
    answer_help(__doc__)
    main()
