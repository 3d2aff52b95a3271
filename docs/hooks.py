"""README.md is the first page of the site, CHANGELOG.md the last, and what lies outside docs/ is named, not linked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that lie outside docs/."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Point links to where pages are in the site."""

    def point(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        target = target.removeprefix("docs/") if page.file.src_uri in PAGES else target
        path = target.partition("#")[0]
        inside = not path or ":" in path or files.get_file_from_path(path) is not None
        elsewhere = not inside and (ROOT / path.removeprefix("../")).exists()
        return words if elsewhere else f"{image}[{words}]({target})"

    return LINK.sub(point, markdown)
