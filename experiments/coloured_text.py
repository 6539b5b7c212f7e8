"""Self-contained HTML pages that show text with a background colour for each token."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

STYLE = (
    "body{font:14px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap;border:1px solid #ddd;padding:1rem}"
)


def texts(codec: Any, tokens: Iterable[int] | np.ndarray) -> list[str]:
    """Returns the text of each token. Bytes that are no UTF-8 become replacement characters."""
    return [piece.decode(errors="replace") for piece in codec.pieces([int(t) for t in tokens])]


def span(text: str, colour: str, tooltip: str = "") -> str:
    title = f' title="{tooltip}"' if tooltip else ""
    return f'<span style="background:{colour}"{title}>{text}</span>'


def page(
    title: str,
    caption: str,
    legend: Iterable[tuple[str, str]],
    sequences: Iterable[Sequence[tuple[str, str, str]]],
) -> str:
    """Returns an HTML page.

    legend: (label, colour) pairs, shown after the caption.
    sequences: for each sequence, a (text, colour, tooltip) triple per token.
    """
    title = html.escape(title)
    marks = "".join(span(f"&nbsp;{label}&nbsp;", colour) for label, colour in legend)
    bodies = (
        "".join(span(html.escape(text), colour, tooltip) for text, colour, tooltip in sequence)
        for sequence in sequences
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{caption}{marks}</p>"
        f"{''.join(f'<pre>{body}</pre>' for body in bodies)}</html>\n"
    )
