"""Documents of lines and tables, and how they are rendered: one function a format, of plain text that it
escapes itself.
"""

from .document import Document, Table
from .markdown import to_markdown


__all__ = ["FORMATS", "Document", "Table", "to_markdown"]

FORMATS = {".md": to_markdown}
"""The formats that a report is saved in beside its data, by the ending of their files."""
