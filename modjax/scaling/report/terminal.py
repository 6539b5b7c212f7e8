"""The fits as text for a terminal: tables of aligned columns, then the sentences."""

from collections.abc import Sequence

from modjax.scaling.fit.results import Fits
from modjax.scaling.report.prose import marked, method, no_causal_sentence, sentences
from modjax.scaling.report.tables import Table, as_trained_table, optimum_table, seed_table


def render_text(fits: Fits) -> str:
    """Returns the tables of optima and of seeds, the sentences and the method."""
    fits = marked(fits)
    parts = [_ruled(optimum_table(fits))]
    if fits.repeats:
        parts.append(_ruled(seed_table(fits.repeats)))
    if fits.no_causal_loss:
        parts.append("\n".join(no_causal_sentence(one, fits.loss) for one in fits.no_causal_loss))
        if fits.loss == "causal":
            parts.append(_ruled(as_trained_table(fits.no_causal_loss)))
    return "\n\n".join([*parts, "\n".join(sentences(fits)), method(fits)])


def _ruled(table: Table) -> str:
    return text_table(*table, left=2, rule=True)


def text_table(
    header: Sequence[str], body: Sequence[Sequence[str]], *, left: int = 1, rule: bool = False
) -> str:
    """Returns aligned columns: the first `left` to the left, the others to the right.

    rule: whether to draw a line under the header.
    """
    table = [header, *body]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = zip(row, widths, strict=True)
        aligned = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells))
        lines.append("  ".join(aligned).rstrip())
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
