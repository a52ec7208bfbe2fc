"""Self-contained HTML page, light and dark: no script, no external resource, text escaped."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from outstation.foundation.render.svg import FONT, html_text
from outstation.foundation.render.theme import adaptive_css

# A table that is wider than the screen scrolls by itself: shadows at its edges and the keyboard show that.
SCROLL_ATTRIBUTES = 'class="scroll" tabindex="0" role="group" aria-label="table"'
SCROLL_SHADOWS = """\
background:linear-gradient(90deg,var(--paper) 40%,transparent) 0/60px 100% no-repeat local,
linear-gradient(-90deg,var(--paper) 40%,transparent) 100%/60px 100% no-repeat local,
linear-gradient(90deg,var(--reference-edge),transparent) 0/12px 100% no-repeat,
linear-gradient(-90deg,var(--reference-edge),transparent) 100%/12px 100% no-repeat"""
# The page loads nothing, so the browser need not allow anything.
_CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 FONT}
main{max-width:1000px;margin:0 auto;padding:36px 20px 56px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 8px;letter-spacing:-.005em}
h3{font-size:15px;margin:0 0 2px}
p{margin:0 0 12px;max-width:72ch}
.muted,.lead{color:var(--muted)}
.lead{margin:-4px 0 12px}
.grid{display:grid;gap:16px;align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.card{border:1px solid var(--grid);border-radius:10px;padding:16px 18px;background:var(--paper);min-width:0}
.card>svg{margin-top:8px}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr));margin:20px 0 8px}
.tile{border:1px solid var(--grid);border-radius:10px;padding:12px 16px;background:var(--panel)}
.tile{display:flex;flex-direction:column}
.tile b{display:block;margin-top:auto;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:13px;color:var(--muted)}
.notice{border-left:4px solid var(--drift);background:var(--drift-band);border-radius:6px}
.notice{padding:10px 16px;margin:16px 0}
.notice.ok{border-color:var(--ok);background:var(--panel)}
.notice ul{margin:4px 0 2px;padding-left:20px}
.notes{color:var(--muted);font-size:14px;margin:12px 0 0;padding-left:18px}
.notice li{margin:2px 0;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;max-width:560px;font-family:inherit}
.scroll{overflow-x:auto;margin:8px 0;SCROLL_SHADOWS}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{font-weight:600;color:var(--muted);font-size:13px;white-space:nowrap}
th.n,td.n{text-align:right}
th:last-child,td:last-child{padding-right:0}
tr:last-child td{border-bottom:0}
td.fixed{white-space:nowrap}
.state{display:inline-block;border-radius:99px;padding:0 9px;font-size:12.5px;white-space:nowrap;border:1px solid}
.state.ok{color:var(--ok)}.state.warning{color:var(--drift)}.state.none{color:var(--muted)}
code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{margin-top:44px;border-top:1px solid var(--grid);padding-top:12px;color:var(--muted);font-size:13px}
@media(max-width:640px){th{white-space:normal;vertical-align:bottom}td:last-child:not(.n){min-width:11em;overflow-wrap:anywhere}}
@media print{main{max-width:none;padding:0}.card,.tile,tr{break-inside:avoid}}
"""


class Markup(msgspec.Struct, frozen=True):
    """HTML that is inserted unescaped."""

    html: str


Content = str | Markup


def to_html(content: Content) -> str:
    return content.html if isinstance(content, Markup) else html_text(content)


def render_document(title: str, body: Sequence[Markup], more_css: str = "") -> str:
    css = _CSS.replace("FONT", FONT).replace("SCROLL_SHADOWS", SCROLL_SHADOWS) + more_css
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{adaptive_css()}{css}</style></head>\n<body><main>\n"
        + "\n".join(part.html for part in body)
        + "\n</main></body></html>\n"
    )


def element(tag: str, *content: Content, css_class: str = "") -> Markup:
    attribute = f' class="{css_class}"' if css_class else ""
    return Markup(f"<{tag}{attribute}>{''.join(to_html(part) for part in content)}</{tag}>")


def section(title: str, intro: str, *content: Markup) -> Markup:
    head = [element("h2", title), *([element("p", intro, css_class="lead")] if intro else [])]
    return element("section", *head, *content)


def card(title: str, intro: str, svg: str, *more: Markup) -> Markup:
    head = [element("h3", title)] if title else []
    if intro:
        head.append(element("p", intro, css_class="muted"))
    return element("div", *head, Markup(svg), *more, css_class="card")


def table(header: Sequence[str], rows: Sequence[Sequence[Content]], numeric_columns: Sequence[int] = ()) -> Markup:
    """Return a table whose `numeric_columns` are right-aligned."""

    def table_row(tag: str, row: Sequence[Content]) -> Markup:
        cells = [element(tag, cell, css_class="n fixed" if i in numeric_columns else "") for i, cell in enumerate(row)]
        return element("tr", *cells)

    top = [table_row("th", header)] if any(header) else []
    body = element("table", *top, *(table_row("td", row) for row in rows))
    return Markup(f"<div {SCROLL_ATTRIBUTES}>{body.html}</div>")


def bullet_list(items: Sequence[Content], css_class: str = "") -> Markup:
    return element("ul", *(element("li", item) for item in items), css_class=css_class)
