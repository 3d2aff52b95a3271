"""Draw docs/figures/pipeline.svg: python docs/figures/draw_pipeline.py"""

from __future__ import annotations

from html import escape
from pathlib import Path


WIDTH, ROW, BOX, GAP = 880, 46, 190, 26

STYLE = """
  text { font: 13px sans-serif; fill: #1f2937 } .small { font-size: 11.5px; fill: #4b5563 }
  .box { fill: #eef2ff; stroke: #6366f1 } .loop { fill: #f0fdf4; stroke: #16a34a } .end { fill: #fff7ed; stroke: #ea580c }
  .frame { fill: none; stroke: #16a34a; stroke-dasharray: 5 4 } .arrow { stroke: #4b5563; fill: none; marker-end: url(#head) }
  @media (prefers-color-scheme: dark) {
    text { fill: #e5e7eb } .small { fill: #9ca3af } .box { fill: #1e1b4b } .loop { fill: #052e16 } .end { fill: #431407 }
    .arrow { stroke: #9ca3af }
  }
"""

INPUTS = [
    ("dense model", "any PreTrainedModel"),
    ("texts, no labels", "rows -> batches"),
    ("a budget", "sparsity=0.5, ..."),
]

STEPS = [
    ("measure", "what hangs on each unit"),
    ("score and search", "the units worth their cost"),
    ("cut", "heads and neurons are gone"),
    ("tune", "least squares to the dense model"),
    ("advance", "to the next sublayer"),
]

OUTPUTS = [
    ("save_model", "an ordinary checkpoint"),
    ("from_pretrained", "loads it anywhere"),
    ("report, model card", "what was done"),
]


def box(x: float, y: float, title: str, line: str, kind: str) -> str:
    """A box with a title and a line below it."""
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{BOX}" height="{ROW}" rx="7"/>'
        f'<text x="{x + BOX / 2}" y="{y + 19}" text-anchor="middle" font-weight="bold">{escape(title)}</text>'
        f'<text class="small" x="{x + BOX / 2}" y="{y + 36}" text-anchor="middle">{escape(line)}</text>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="arrow" d="M{x1} {y1} L{x2} {y2}"/>'


def column(
    x: float, top: float, height: float, entries: list[tuple[str, str]], kind: str
) -> tuple[str, list[float]]:
    """Boxes one below the other, spread over a height; their drawing and the heights of their middles."""
    space = (height - len(entries) * ROW) / (len(entries) - 1)
    tops = [top + i * (ROW + space) for i in range(len(entries))]
    return "".join(box(x, y, *entry, kind) for y, entry in zip(tops, entries, strict=True)), [
        y + ROW / 2 for y in tops
    ]


def draw() -> str:
    """The picture, as SVG."""
    top, height = 44, len(STEPS) * (ROW + GAP) - GAP
    left, middle, right = 20.0, (WIDTH - BOX) / 2, WIDTH - BOX - 20.0
    inputs, from_y = column(left, top + 40, height - 80, INPUTS, "box")
    steps, steps_y = column(middle, top, height, STEPS, "loop")
    outputs, to_y = column(right, top + 40, height - 80, OUTPUTS, "end")
    edge, centre = 16, WIDTH / 2
    arrows = [arrow(left + BOX, y, middle - edge - 4, y) for y in from_y]
    arrows += [arrow(middle + BOX + edge, y, right - 4, y) for y in to_y]
    arrows += [
        arrow(centre, a + ROW / 2, centre, b - ROW / 2 - 3)
        for a, b in zip(steps_y, steps_y[1:], strict=False)
    ]
    frame = (
        f'<rect class="frame" x="{middle - edge}" y="{top - edge}" width="{BOX + 2 * edge}" '
        f'height="{height + 2 * edge}" rx="9"/>'
        f'<text class="small" x="{centre}" y="{top - edge - 8}" text-anchor="middle">'
        "for each sublayer, from the lowest to the highest</text>"
    )
    head = '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
    head += '<path d="M0 0 L6 3 L0 6 z" fill="#6b7280"/></marker></defs>'
    total = top + height + edge + 14
    body = "\n".join([head, f"<style>{STYLE}</style>", frame, inputs, steps, outputs, *arrows])
    label = "A dense model, texts and a budget go in; each sublayer is measured, cut and tuned; a checkpoint comes out."
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" role="img" aria-label="{label}">'
    return f"{opening}\n{body}\n</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_name("pipeline.svg").write_text(draw(), encoding="utf-8")
