"""The pieces of an HTML page: escaped text, lists, sortable tables, figures in place."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from modjax.scaling.marks import FAINT, INK, SURFACE


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
    header: Iterable[str],
    body: Sequence[Sequence[str]],
    keys: Sequence[Sequence[str]] | None = None,
    rows: Sequence[str] | None = None,
) -> str:
    """A sortable table; `keys` are the values to sort by, `rows` the tooltip of each row."""
    head = "".join(f'<th scope="col"><button>{text(name)}</button></th>' for name in header)
    lines = []
    for i, cells in enumerate(body):
        tip = f' data-row="{text(rows[i])}"' if rows else ""
        values = "".join(
            f'<td data-key="{text(keys[i][j] if keys else cell)}">{text(cell)}</td>'
            for j, cell in enumerate(cells)
        )
        lines.append(f"<tr{tip}>{values}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


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
