"""Documents as pages of HTML that need nothing else: no network, no script, light or dark as the reader has
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..text import printable
from .document import Chart, Document, Table
from .pictures import HINT, INK, can_draw, draw


STYLE = """
.kprune { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
.kprune { max-width: 54rem; margin: 0 auto; padding: 1rem }
.kprune h1 { font-size: 1.3rem; line-height: 1.3; overflow-wrap: anywhere }
.kprune p { overflow-wrap: anywhere }
.kprune div { overflow-x: auto }
.kprune table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
.kprune th, .kprune td { padding: .25rem .7rem; border-bottom: 1px solid #8886; white-space: nowrap }
.kprune figure { margin: 1.5rem 0 }
.kprune figcaption { font-weight: 600 }
.kprune svg { width: 100%; min-width: 22rem; height: auto }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
</head>
<body>
{body}</body>
</html>
"""
SIDES = {"l": "left", "c": "center", "r": "right"}


def to_html(document: Document) -> str:
    """A page of its own that shows a document."""
    first = next((block for block in document if not isinstance(block, Table | Chart)), ["Report"])
    return PAGE.format(title=plain(" ".join(first)), body=fragment(document))


def fragment(document: Document) -> str:
    """A document as a part of a page, such as a notebook. Charts are left out, and that is said, where
    matplotlib is not there to draw them.
    """
    parts, drawable = [f"<style>{STYLE}</style>"], can_draw()
    tag = "h1"
    for block in document:
        if isinstance(block, Table):
            parts.append(table(block))
        elif not isinstance(block, Chart):
            parts += [f"<{tag}>{plain(line)}</{tag}>" for line in block]
            tag = "p"
        elif drawable:
            parts.append(figure(block))
    if not drawable and any(isinstance(block, Chart) for block in document):
        parts.append(f"<p>{plain(HINT)}</p>")
    return '<article class="kprune">\n' + "\n".join(parts) + "\n</article>\n"


def plain(text: object) -> str:
    """Text that makes no markup, whatever is in it."""
    return escape(printable(str(text)))


def figure(chart: Chart) -> str:
    """A chart as a drawing within the page, its words in the colour of the page."""
    svg = draw([chart], "svg").decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{plain(chart.title)}"'
    caption = f"<figcaption>{plain(chart.title)}</figcaption>"
    return f"<figure>{caption}<div>{svg.replace('<svg', label, 1)}</div></figure>"


def table(block: Table) -> str:
    """A table that can be moved sideways where it is wider than the page."""
    styles = [f' style="text-align:{SIDES[side]}"' for side in block.align]

    def row(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(styles, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{style}>{cell}</{tag}>" for style, cell in pairs) + "</tr>"

    rows = [list(map(plain, cells)) for cells in block.rows]
    for (place, column), mark in block.marks.items():
        rows[place][column] += f" <strong>{plain(mark)}</strong>"
    head = row("th", list(map(plain, block.columns)))
    body = "".join(row("td", cells) for cells in rows)
    return f"<div><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
