"""The pieces of an HTML page: escaped text, lists, sortable tables, figures in place."""

import html
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from modjax.scaling.formatting import budget
from modjax.scaling.report.markers import FAINT, INK, SURFACE


def text(value: object) -> str:
    """A value as it may stand in a page."""
    return html.escape(str(value))


def script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("<", "\\u003c")


def bullets(items: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>"


def details(title: str, value: Any) -> str:
    """JSON behind a title that opens it."""
    return (
        f"<details><summary>{text(title)}</summary>"
        f"<pre>{text(json.dumps(value, indent=1))}</pre></details>"
    )


def table(
    header: Iterable[str], body: Iterable[Sequence[object]], rows: Sequence[str] | None = None
) -> str:
    """A table that can be sorted by each column; `rows` are the tooltips of its rows."""
    head = "".join(f'<th scope="col"><button>{text(name)}</button></th>' for name in header)
    tips = itertools.repeat("") if rows is None else (f' data-row="{text(row)}"' for row in rows)
    # HTML lets the end tags of cells be left out: an eighth of a large page.
    cells = ("".join(map(_cell, row)) for row in body)
    lines = (f"<tr{tip}>{row}</tr>" for tip, row in zip(tips, cells, strict=False))
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    """A text as it is, a number rounded, the rest as JSON.

    `data-key` is what to sort by where that is not as shown, to the 7 digits of a float32;
    report.js reads a number past its commas.
    """
    if isinstance(value, float):
        shown = budget(value) if 1e5 <= abs(value) < math.inf else f"{value:.4g}"
        key = "" if float(shown) == value else f' data-key="{value:.7g}"'
        return f"<td{key}>{shown}"
    if type(value) is int:
        return f"<td>{value:,}"
    if value is not None and not isinstance(value, str):
        value = json.dumps(value)
    return f"<td>{text(value or '')}"


def inline_svg(source: str, name: str) -> str:
    """A matplotlib SVG as part of a page: no prologue, no namespaces, colours that follow the page.

    `id="run:..."` and `id="optimum:..."` become `data-tip`, because a run is in several figures;
    every other id gets the figure's name in front.
    """
    svg = source[source.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'id="((?:run|optimum):[^"]*)"', r'data-tip="\1" tabindex="0"', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = svg.replace(INK, "currentColor").replace(SURFACE, "var(--surface)")
    return svg.replace(FAINT, "var(--faint)")
