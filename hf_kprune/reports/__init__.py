"""Documents of lines, tables and charts, and how they are rendered: one function a format, of plain text that
it escapes itself.
"""

from .document import Chart, Document, Table
from .html import fragment, to_html
from .markdown import to_markdown
from .pictures import HINT, can_draw, draw


__all__ = [
    "FORMATS",
    "HINT",
    "Chart",
    "Document",
    "Table",
    "can_draw",
    "draw",
    "fragment",
    "to_html",
    "to_markdown",
]

FORMATS = {".md": to_markdown, ".html": to_html}
"""The formats that a report is saved in beside its data, by the ending of their files."""
