"""The tables of fits in a report."""

from modjax.scaling import words
from modjax.scaling.numbers import budget
from modjax.scaling.page import table
from modjax.scaling.results import Fits


def gap_table(fits: Fits) -> list[str]:
    """Every arm against the baseline, each at its own optimum; [] where there is none."""
    if not fits.gaps:
        return []
    show = words.fixed(4, "+"), words.fixed(2, "+"), words.fixed(2)
    rows = [
        (g.arm, budget(g.budget_flops), "refused", *[""] * 5)
        if g.loss is None or g.percent is None
        else (
            g.arm,
            budget(g.budget_flops),
            show[0](g.loss),
            words.span(g.loss_interval, show[0]),
            show[1](g.percent),
            words.span(g.percent_interval, show[1]),
            "" if g.flops_ratio is None else show[2](g.flops_ratio),
            words.span(g.flops_ratio_interval, show[2]),
        )
        for g in fits.gaps
    ]
    header = (
        f"against {fits.baseline}",
        "budget",
        "loss gap",
        "95% interval",
        "%",
        "95% interval",
        "FLOPs ratio",
        "95% interval",
    )
    return [table(header, rows)]


def law_table(fits: Fits) -> list[str]:
    """The power laws that were fitted."""
    rows = [
        (
            law.arm,
            law.quantity.replace("_", " "),
            f"{law.coefficient:.3g}",
            f"{law.exponent:.4f}",
            words.span(law.exponent_interval, words.fixed(4)),
            str(law.points),
        )
        for law in fits.laws
        if law.coefficient is not None and law.exponent is not None
    ]
    header = ("arm", "at the optimum", "coefficient", "exponent of C", "95% interval", "optima")
    return [table(header, rows)] if rows else []


def repeat_table(fits: Fits) -> list[str]:
    """What several seeds of a cell reached."""
    if not fits.repeats:
        return []
    return ["<h3>Seeds</h3>", table(words.REPEAT_HEADER, words.repeat_rows(fits))]
