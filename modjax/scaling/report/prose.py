"""The results of the fits in plain English sentences, and in a table for the terminal."""

import math
from collections.abc import Callable, Sequence

from modjax.scaling.fit.parametric import NAMES, Surface
from modjax.scaling.fit.results import (
    SIZES,
    Fits,
    Gap,
    NoCausalLoss,
    Parabola,
    PowerLaw,
    Range,
    SeedSpread,
)
from modjax.scaling.formatting import budget, count
from modjax.scaling.report.comparison import loss_sentence, marked, no_causal_sentence

KINDS = {
    ("parameters", "non_embedding"): "non-embedding parameters",
    ("parameters", "total"): "total parameters",
    ("parameters", "active"): "active parameters, without embeddings",
    **{("forward_flops", size): "forward FLOPs per token" for size in SIZES},
}


def fixed(digits: int, sign: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:{sign}.{digits}f}"


def span(ends: Range | None, show: Callable[[float], str], unit: str = "") -> str:
    """An interval in words. What is open at both ends is not determined.

    An end is open where it is infinite; the lower end also at 0, which is 10 to minus infinity.
    """
    if ends is None:
        return "not known"
    low, high = (
        None if open_end else show(end) + unit
        for end, open_end in zip(ends, open_ends(ends), strict=True)
    )
    if low and high:
        return f"{show(ends[0])} to {high}"
    return f"at least {low}" if low else f"at most {high}" if high else "not determined"


def open_ends(ends: Range) -> tuple[bool, bool]:
    low, high = ends
    return low == -math.inf or low == 0 < high, high == math.inf


def parabola_sentence(p: Parabola, size: str) -> str:
    kind = KINDS[p.quantity, size]
    where = f"{p.arm} at {budget(p.budget_flops)} FLOPs"
    if p.refusal is not None:
        return f"{where}: no optimum in {kind}: {p.refusal}."
    assert p.optimum is not None and p.loss is not None and p.off_centre is not None
    assert p.low is not None and p.high is not None and p.optimum_interval is not None
    side = "below" if p.off_centre < 0 else "above"
    text = (
        f"{where}: the loss is least at {count(p.optimum)} {kind} (95% interval "
        f"{span(p.optimum_interval, count)}), where it is {p.loss:.4f} nats per token "
        f"({span(p.loss_interval, fixed(4))}); the vertex lies {abs(p.off_centre):.0%} of the "
        f"half range {side} the centre of the {p.sizes} sizes sampled, {count(p.low)} to "
        f"{count(p.high)}"
    )
    if abs(p.off_centre) > 0.5:
        text += ", far enough off-centre to bias it"
    beyond = p.optimum_interval[0] < p.low or p.optimum_interval[1] > p.high
    if beyond and not all(open_ends(p.optimum_interval)):
        text += "; its interval reaches beyond the sampled sizes"
    return text + "."


def law_sentence(law: PowerLaw, size: str) -> str:
    kind = "optimal loss" if law.quantity == "loss" else f"optimal {KINDS[law.quantity, size]}"
    if law.refusal is not None:
        return f"{law.arm}: no power law for the {kind}: {law.refusal}."
    assert law.coefficient is not None and law.exponent is not None
    freedom = (
        "two points determine it exactly and nothing tests the form"
        if law.freedom == 0
        else f"{law.points} optima, {law.freedom} degree{'s' * (law.freedom > 1)} of freedom"
    )
    return (
        f"{law.arm}: {kind} = {law.coefficient:.3g} C^{law.exponent:.3f} (exponent's 95% interval "
        f"{span(law.exponent_interval, fixed(3))}; {freedom})."
    )


def gap_sentence(gap: Gap) -> str:
    where = f"{gap.arm} against {gap.baseline} at {budget(gap.budget_flops)} FLOPs"
    if gap.refusal is not None:
        return f"{where}: no comparison of optima ({gap.refusal})."
    assert gap.loss is not None and gap.loss_interval is not None and gap.percent is not None
    low, high = gap.loss_interval
    ends = span(gap.loss_interval, fixed(4, "+"), " nats")
    if not all(open_ends(gap.loss_interval)):
        ends += ", " + span(gap.percent_interval, fixed(2, "+"), "%")
    text = (
        f"{where}, each at its own optimum: {gap.arm}'s loss is {abs(gap.loss):.4f} nats "
        f"{'lower' if gap.loss < 0 else 'higher'} ({gap.percent:+.2f}%; 95% interval {ends})"
    )
    if low <= 0 <= high:
        text += ", which these runs cannot tell from no difference"
    if gap.flops_ratio is not None:
        text += (
            f"; its optimum takes {gap.flops_ratio:.2f} times the forward FLOPs per token "
            f"({span(gap.flops_ratio_interval, fixed(2))})"
        )
    return text + "."


def surface_sentence(surface: Surface) -> str:
    where = f"{surface.arm}, all budgets together, L = E + A/N^alpha + B/D^beta"
    if surface.refusal is not None:
        return f"{where}: not reported: {surface.refusal}."
    parts = []
    for name in NAMES:
        value = getattr(surface, name)
        ends = (surface.intervals or {}).get(name)
        parts.append(f"{name} {value:.4g}" + (f" ({span(ends, '{:.3g}'.format)})" if ends else ""))
    return f"{where} ({surface.runs} runs): {', '.join(parts)}."


def method(fits: Fits) -> str:
    """Says how the intervals were made, and what they leave out."""
    seeds = (
        f"up to {fits.seeds_per_cell} seeds per cell enter as their mean and their spread"
        if fits.seeds_per_cell > 1
        else "every cell was run with one seed, so differences between seeds enter only as "
        "scatter about the parabolas"
    )
    return (
        f"{loss_sentence(fits)} Sizes count {KINDS['parameters', fits.size]}. Intervals are 95%, "
        f"from {fits.draws} draws "
        "of a parametric bootstrap: evaluation error, shared by all runs because they are scored "
        "on the same text, and the scatter of runs about the parabolas of their budget, with "
        f"its own uncertainty; {seeds}. A power law weighs each optimum by its own variance; in a "
        "draw it leaves out those that the draw does not determine, and where the optima scatter "
        "about the law more than their variances explain, its interval is that of this scatter. An "
        "interval that is open at both ends is called not determined. Diverged runs are left out "
        "of every fit by rule."
    )


def sentences(fits: Fits) -> list[str]:
    """Returns every result as one sentence: gaps, optima, power laws, surfaces, diverged runs."""
    said = [gap_sentence(gap) for gap in fits.gaps]
    said += [parabola_sentence(p, fits.size) for p in fits.parabolas]
    said += [law_sentence(law, fits.size) for law in fits.laws]
    said += [surface_sentence(surface) for surface in fits.surfaces]
    if fits.diverged:
        said.append(f"Diverged and left out of every fit: {', '.join(fits.diverged)}.")
    return said


HEADER = (
    "arm",
    "budget",
    "sizes",
    "optimum N",
    "95% interval",
    "loss",
    "95% interval",
    "off-centre",
    "FLOPs/token",
)


def rows(fits: Fits) -> list[tuple[str, ...]]:
    """One row per arm and budget, for `HEADER`; a refused fit says so in place of its optimum."""
    table = []
    for p in fits.parabolas:
        if p.quantity != "parameters":
            continue
        start = (p.arm, budget(p.budget_flops), str(p.sizes))
        if p.refusal is not None:
            table.append((*start, "refused", *[""] * 5))
            continue
        flops = fits.parabola(p.arm, p.budget_flops, "forward_flops")
        assert p.optimum is not None and p.loss is not None and p.off_centre is not None
        table.append(
            (
                *start,
                count(p.optimum),
                span(p.optimum_interval, count),
                f"{p.loss:.4f}",
                span(p.loss_interval, fixed(4)),
                f"{p.off_centre:+.2f}",
                count(flops.optimum) if flops and flops.optimum else "refused",
            )
        )
    return table


REPEAT_HEADER = ("arm", "budget", "width", "N", "seeds", "mean loss", "std of a seed")
AS_TRAINED_HEADER = (*REPEAT_HEADER[:-2], "std of a seed", "loss as trained")


def as_trained_rows(found: Sequence[NoCausalLoss]) -> list[tuple[str, ...]]:
    """Returns one row per cell without a causal loss, for `AS_TRAINED_HEADER`."""
    rows = repeat_rows([cell for one in found for cell in one.as_trained])
    return [(*start, deviation, loss) for *start, loss, deviation in rows]


def repeat_rows(cells: Sequence[SeedSpread]) -> list[tuple[str, ...]]:
    """Returns one row per cell, for `REPEAT_HEADER`."""
    return [
        (
            r.arm,
            budget(r.budget_flops),
            str(r.d_model),
            count(r.params),
            str(r.seeds),
            f"{r.loss:.4f}",
            "" if r.deviation is None else f"{r.deviation:.4f}",
        )
        for r in cells
    ]


def render_text(fits: Fits) -> str:
    """Returns the tables of optima and of seeds, the sentences and the method, for a terminal."""
    fits = marked(fits)
    lines = [text_table(HEADER, rows(fits), left=2, rule=True)]
    if fits.repeats:
        lines += ["", text_table(REPEAT_HEADER, repeat_rows(fits.repeats), left=2, rule=True)]
    if fits.no_causal_loss:
        lines += ["", *(no_causal_sentence(one, fits.loss) for one in fits.no_causal_loss)]
    if fits.no_causal_loss and fits.loss == "causal":
        body = as_trained_rows(fits.no_causal_loss)
        lines += ["", text_table(AS_TRAINED_HEADER, body, left=2, rule=True)]
    return "\n".join([*lines, "", *sentences(fits), "", method(fits)])


def text_table(
    header: Sequence[str], body: Sequence[Sequence[str]], *, left: int = 1, rule: bool = False
) -> str:
    """Aligned columns: the first `left` to the left, the others to the right.

    rule: a line under the header.
    """
    table = [header, *body]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
